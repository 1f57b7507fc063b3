"""How long a worker may take for what it is in before it counts as hung, from its own measured history."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic.health.evidence import Observed
from elastic.observe.activity import CHECKPOINT, LOADER, RECOVERY_PHASES, STEP_PHASES, TRAIN_FN
from elastic.settings import JobSettings

HISTORY_TIMES = 10.0
"""A phase may use so many times as much processor time as it took at most in recent steps."""

IDLE_TIMES = 3.0
"""A phase may sleep so many times as long as it took at most in recent steps."""

LOADER_TIMES = 3.0
"""How many times `hung_s` a data loader may wait: storage pauses now and then."""

FIRST_TIMES = 10.0
"""How many times `hung_s` a worker may wait in the first step of a view, or between steps."""

USER_TIMES = 100.0
"""How many times `hung_s` the user's code outside steps, a checkpoint's storage or the start of a worker may wait: for an upload, say."""

SPUN_SHARE = 1 / 3
"""Share of `hung_s` for which a worker must have been in one phase of a step to count as spinning. Processor time is stronger evidence than
sleep, which may end at any time. A data loader gets all of `hung_s`: it may unpack a large file now and then."""

RAN_SHARE = 0.75
"""Share of that time in which it must have run: on a crowded machine it is not always running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of a job in seconds; None: never excluded for it.

    `stopped_s`: how long a process may be stopped. `hung_s`: the least time without progress that counts as a hang, in a phase of a step.
    """

    stopped_s: float | None
    hung_s: float | None

    @classmethod
    def of(cls, settings: JobSettings) -> Limits:
        return cls(stopped_s=settings.stopped_after, hung_s=settings.hung_after)


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How long a worker may go without using a processor (`idle_s`), how much processor time it may use (`ran_s`), and for how long it may
    compute (`busy_s`): it is spinning if it exceeds both."""

    idle_s: float
    ran_s: float = math.inf
    busy_s: float = 0.0


def allowance(seen: Observed, hung_s: float) -> Allowance:
    """Returns what a worker is allowed in what it is in now."""
    doing, standing = seen.doing, seen.standing
    if doing is None or standing is None:
        return Allowance(idle_s=USER_TIMES * hung_s)
    if standing.place == CHECKPOINT:
        return Allowance(idle_s=USER_TIMES * hung_s)
    if doing.phase in RECOVERY_PHASES:
        return Allowance(idle_s=hung_s, ran_s=USER_TIMES * hung_s)
    if standing.place == TRAIN_FN:
        return Allowance(idle_s=USER_TIMES * hung_s)
    longest_s = standing.longest_s
    if doing.phase not in STEP_PHASES or standing.first or not longest_s:
        ran_s = USER_TIMES * hung_s if longest_s else math.inf
        return Allowance(idle_s=max(FIRST_TIMES * hung_s, IDLE_TIMES * longest_s), ran_s=max(ran_s, HISTORY_TIMES * longest_s))
    times, busy_s = (LOADER_TIMES, hung_s) if standing.place == LOADER else (1.0, SPUN_SHARE * hung_s)
    ran_s = max(RAN_SHARE * busy_s, HISTORY_TIMES * longest_s)
    return Allowance(idle_s=max(times * hung_s, IDLE_TIMES * longest_s), ran_s=ran_s, busy_s=busy_s)
