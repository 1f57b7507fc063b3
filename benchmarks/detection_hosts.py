"""Faults of whole hosts for `detection.py`: one job on three hosts (`detection_jobs.py`) has one fault after the other.

Before each fault all hosts are there, and have trained for twenty steps: a host that was lost has come back, by itself or as a new one,
and its workers are members again. So no fault finds the job in another state than the first one did, but for which host coordinates. The
time of a fault and all figures are of one clock, since all hosts are on this machine. `noticed` is the time until the agent that
coordinates acts on it (after the loss of the coordinator: another one), `running` the time until all members run in the next view, and
`gap` the longest time between two steps in that period, less the usual one, as a loop body sees it.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from detection_jobs import HOSTS, Job, job_on_hosts, until

_SETTLES_S = 1.0
_LOST = ("death", "eviction", "drain")
_FIGURES = ("noticed_s", "running_s", "gap_s", "steps_redone", "step_s")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the host at a place, which coordinates or does not, and how it comes back: else another agent takes its place."""

    happens: Callable[[Job, int], None]
    ends: Callable[[Job, int], None] = lambda job, place: job.start(place)
    coordinator: bool = False


def _kill(job: Job, place: int) -> None:
    agent = job.hosts[place].agent
    os.kill(job.hosts[place].process.pid, signal.SIGSTOP)  # a launcher that runs would start another agent
    os.kill(agent, signal.SIGKILL)
    job.hosts[place].process.kill()
    job.hosts[place].process.wait()


def _drain(job: Job, place: int) -> None:
    job.hosts[place].process.send_signal(signal.SIGTERM)


def _return(job: Job, place: int) -> None:
    job.hosts[place].process.wait()
    job.start(place)


def _split(*, both: bool) -> Callable[[Job, int], None]:
    """The host's packets to the others are lost, and with `both` theirs to it; all still reach etcd."""

    def act(job: Job, place: int) -> None:
        for other in {*range(HOSTS)} - {place}:
            job.net.mute(place, other)
            if both:
                job.net.mute(other, place)

    return act


def _join(job: Job, place: int) -> None:
    for other in {*range(HOSTS)} - {place}:
        for sender, receiver in ((place, other), (other, place)):
            words = ["neigh", "del", f"{job.net.subnet}.{receiver + 1}", "dev", "eth0"]
            subprocess.run(["ip", "-n", f"{job.net.name}{sender}", *words], check=False, capture_output=True)


def _cut(job: Job, place: int) -> None:
    job.net.cut(place)


def _heal(job: Job, place: int) -> None:
    job.net.heal(place)


HOST_FAULTS: dict[str, Fault] = {
    "agent killed": Fault(happens=_kill),
    "host vanished": Fault(happens=_cut, ends=_heal),
    "network split": Fault(happens=_split(both=True), ends=_join),
    "network split one way": Fault(happens=_split(both=False), ends=_join),
    "coordinator killed": Fault(happens=_kill, coordinator=True),
    "coordinator vanished": Fault(happens=_cut, ends=_heal, coordinator=True),
    "drained": Fault(happens=_drain, ends=_return),
}
"""By kind: what happens to a host."""


def _once(job: Job, kind: str) -> dict[str, Any]:
    """Lets one fault happen, and the host return; returns the figures."""
    fault = HOST_FAULTS[kind]
    place = job.coordinator if fault.coordinator else job.any_other()
    workers, told = job.hosts[place].workers, job.told()
    witness = job.others(place)[0]
    before = len(witness.incidents)
    at = time.monotonic()
    fault.happens(job, place)
    found = until(lambda: [each for each in witness.incidents[before:] if each["kind"] in _LOST], f"{kind}: the incident")[0]
    if sorted([found["worker"], *found["also"]]) != workers:
        raise SystemExit(f"{kind}: workers {found['worker']} and {found['also']} were lost instead of {workers}: {found['why']}")
    if fault.coordinator:
        job.coordinating(place, told)
    noticed, running = (found["at"] + found[name] / 1000 - at for name in ("detected_ms", "running_ms"))
    time.sleep(max(0.0, at + running + _SETTLES_S - time.monotonic()))  # steps until then count
    gap, usual = _gap(job, witness.workers[0], at, running)
    job.lost.append(place)
    fault.ends(job, place)
    job.until_all_train(witness)
    job.until_all_train(job.hosts[place])
    figures = {"noticed_s": noticed, "running_s": running, "gap_s": gap, "steps_redone": found["steps_redone"], "step_s": usual}
    return {**figures, "incident": found}


def _gap(job: Job, worker: int, at: float, running: float) -> tuple[float, float]:
    """Returns the longest time between two steps around a fault, less the usual one, and the usual one, both as a worker saw them."""
    times = [when for _, when in job.steps(worker)]
    steps = [(end - begin, begin) for begin, end in pairwise(times)]
    usual = statistics.median(seconds for seconds, begin in steps if at - 5.0 < begin < at)
    return max(seconds for seconds, begin in steps if at - _SETTLES_S < begin < at + running + _SETTLES_S) - usual, usual


def life(kinds: Iterable[str]) -> dict[str, Any]:
    """Runs one job with these faults; returns the figures by kind, its last step, its digest then, and how long it took."""
    began = time.monotonic()
    with job_on_hosts() as job:
        runs = {kind: _once(job, kind) for kind in kinds}
        found = job.stop()
    return {"runs": runs, "seconds": time.monotonic() - began, **found}


def summary(kind: str, lives: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians and worst figures of a fault in these lives of jobs."""
    runs = [each["runs"][kind] for each in lives]
    medians = {name: statistics.median(run[name] for run in runs) for name in _FIGURES}
    most = {f"{name}_most": max(run[name] for run in runs) for name in ("noticed_s", "gap_s", "steps_redone")}
    return {"kind": kind, **medians, **most, "runs": runs}


def paused(seconds: float) -> dict[str, Any]:
    """Stops all workers of a job on three hosts at the same time, for so long; returns whom it lost."""
    with job_on_hosts() as job:
        pids = [each["pid"] for each in job.hosts[0].members["members"]]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(_SETTLES_S)
        job.stop()
        lost = [each for each in job.hosts[0].incidents if each["kind"] in ("death", "eviction")]
    return {"paused_s": seconds, "workers": len(pids), "excluded": lost}
