"""Random schedules: faults at random moments, with random victims; the same seed gives the same schedule. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

from elastic.chaos.injection import Injection
from elastic.chaos.kinds import END_A_HOST, KINDS, kind_of
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.errors import SettingsError
from elastic.observe.activity import RECOVERY_PHASES

FIRST_S, LAST_S = 0.5, 4.0
"""No fault comes earlier after the first step, or later before the end."""

_APART = {"agent-kill": 6.0, "host-loss": 8.0, "partition": 8.0, "drain": 6.0, "join": 4.0, "disk-full": 3.0, "etcd-down": 3.0}
"""Seconds until the next fault, so that hosts are lost one at a time, and a job that ended has been started again."""


def drawn(job: JobSpec, seed: int, mtbf_s: float, kinds: Sequence[str] | None = None, faults: int | None = None) -> Schedule:
    """Draws a schedule: exponential times with the mean `mtbf_s`, until the job ends; or so many `faults`.

    Without `kinds`, all that a job of so many hosts can have. Raises SettingsError.
    """
    if not 0 < mtbf_s < math.inf:
        raise SettingsError(f"mtbf={mtbf_s}: the mean time between faults is a number of seconds above 0")
    if not job.minutes and faults is None:
        raise SettingsError("a random schedule needs the job's minutes")
    chosen = [kind_of(name) for name in (kinds or _fitting(job))]
    generator, found, now = random.Random(seed), list[Injection](), 0.0
    end = 60 * job.minutes - LAST_S if job.minutes else float("inf")
    while faults is None or len(found) < faults:
        now += max(FIRST_S, generator.expovariate(1 / mtbf_s))
        kind = generator.choices(chosen, [each.weight for each in chosen])[0]
        if now + (kind.seconds or 0.0) >= end:
            break
        found.append(_fault(kind.name, round(now, 2), job, generator))
        now += _APART.get(kind.name, 0.0) + (found[-1].lasts_s if kind.name in _APART else 0.0)
    if faults is None and not found:
        raise SettingsError(f"no fault at a mean distance of {mtbf_s:g} s fits into {job.minutes:g} minutes: give more minutes, or others")
    if faults is not None and len(found) < faults:
        raise SettingsError(f"{faults} faults at a mean distance of {mtbf_s:g} s do not fit into {job.minutes:g} minutes")
    return Schedule(job=job, injections=tuple(found), seed=seed, drawn=True)


def _ends_a_host(name: str, job: JobSpec) -> bool:
    """Whether a host is lost to the job: the next one is lost only when there are copies of all state again."""
    return job.hosts > 1 and name in END_A_HOST


def _fitting(job: JobSpec) -> list[str]:
    """The kinds that a job of so many hosts can have; those that need another kind of job only if it is one anyway."""
    workers = job.hosts * job.workers
    return [name for name, kind in KINDS.items() if kind.hosts <= job.hosts and kind.workers <= workers and (job.shared or not kind.shared)]


def _fault(name: str, at: float, job: JobSpec, generator: random.Random) -> Injection:
    workers = job.hosts * job.workers
    fault = Injection(
        kind=name, time=at, place=generator.randrange(workers), host=generator.randrange(job.hosts), settled=_ends_a_host(name, job)
    )
    if name == "kill-many":
        return replace(fault, count=generator.randint(2, max(2, job.workers)))
    if name == "slow":
        return replace(fault, factor=float(generator.randint(2, 8)))
    if name == "delay":
        return replace(fault, factor=float(generator.choice((5, 20, 100))))
    if name == "kill-during-recovery":
        return replace(fault, phase=generator.choice((None, *RECOVERY_PHASES)))
    return fault
