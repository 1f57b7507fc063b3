"""Verdicts about workers, and the sentences in which they state their evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.health.evidence import Observed
from elastic.health.stay import Stay
from elastic.health.waiting import MUTE_S
from elastic.observe.activity import AGENT, CHECKPOINT, LOADER, RECOVERY_PHASES, TRAIN_FN

STOPPED = "stopped"
HUNG = "hung"
HUNG_LOADER = "hung in its data loader"
HUNG_TRAIN_FN = "hung in train_fn"
HUNG_CHECKPOINT = "hung at a checkpoint"
HUNG_RECOVERY = "silent in a recovery"
SPINNING = "spinning"
STARVED = "out of processor time"
CRAWLING = "crawling"
SLOW = "slow"
UNREADY = "never ready"

OWN = (HUNG, HUNG_LOADER, SPINNING)
"""What a worker does by itself: the input may be the cause if others do the same with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A finding about a worker: `kind`, and `why`, the evidence in words. `excludes`: it is to be replaced; else this is only reported.

    `for_s`: how long it has lasted. `pid` is the worker's process, `host` its host in a job of several.
    """

    worker: int
    kind: str
    why: str
    for_s: float
    excludes: bool
    pid: int | None = None
    host: str = ""

    @property
    def sentence(self) -> str:
        """One line for the user."""
        on = f" on {self.host}" if self.host else ""
        return f"worker {self.worker} (process {self.pid}{on}) is {self.kind}: {self.why}"


def hung_kind(seen: Observed) -> str:
    """Returns which kind of hang it is if the worker makes no progress in what it is in."""
    if seen.doing is None or seen.standing is None:
        return UNREADY
    if seen.doing.phase in RECOVERY_PHASES and seen.standing.place != CHECKPOINT:
        return HUNG_RECOVERY
    return {TRAIN_FN: HUNG_TRAIN_FN, LOADER: HUNG_LOADER, CHECKPOINT: HUNG_CHECKPOINT}.get(seen.standing.place, HUNG)


def stopped(seen: Observed, stay: Stay, waiting: Sequence[int]) -> str:
    """Evidence such as `its process has been stopped for 1.2 s, in forward of step 4, micro-batch 1 (state T); worker 0 waits for it`."""
    return f"its process has been stopped for {stay.stopped_s:.1f} s{_in(seen)} ({_kernel(seen)}){_waits(waiting)}"


def idle(seen: Observed, stay: Stay, waiting: Sequence[int]) -> str:
    """Evidence of a worker that sleeps."""
    mute = f"; no Python code has run in it for {seen.mute_s:.0f} s" if seen.mute_s >= MUTE_S else ""
    return f"it has used no processor for {stay.idle_s:.1f} s{_in(seen)}{_usual(seen)} ({_kernel(seen)}){mute}{_waits(waiting)}"


def busy(seen: Observed, stay: Stay, waiting: Sequence[int]) -> str:
    """Evidence of a worker that computes and does not get on."""
    used = f"it has used {stay.ran_s:.1f} s of processor time in {stay.still_s:.1f} s"
    return f"{used}{_in(seen)}{_usual(seen)}{_waits(waiting)}"


def starved(seen: Observed, stay: Stay, waiting: Sequence[int]) -> str:
    """Evidence of a worker that wants to run and does not get a processor."""
    got = f"in {stay.still_s:.1f} s it ran for {stay.ran_s:.1f} s and waited for a processor for {stay.delayed_s:.1f} s"
    return f"{got}{_in(seen)}{_waits(waiting)}; it is not replaced, since another worker here would get no more"


def _in(seen: Observed) -> str:
    doing, standing = seen.doing, seen.standing
    if doing is None:
        return ", before its first step"
    step = f" of step {doing.step}" if doing.step >= 0 else ""
    batch = f", micro-batch {doing.micro_batch}" if doing.micro_batch >= 0 else ""
    code = f", {seen.code}" if seen.code else ""
    place = "" if standing is None else standing.place
    if place == CHECKPOINT:
        return ", waiting for the storage of checkpoints"
    if doing.phase not in RECOVERY_PHASES:
        if place == TRAIN_FN:
            after = f" after step {doing.step}" if doing.step >= 0 else ""
            return f", in the code of train_fn{after}{code}"
        if place == LOADER:
            return f", in the data loader{step}{batch}{code}"
    return f", in {doing.phase}{step}{batch}{code}"


def _usual(seen: Observed) -> str:
    longest = 0.0 if seen.standing is None or seen.standing.place in (TRAIN_FN, CHECKPOINT) else seen.standing.longest_s
    return f", which took it at most {longest:.2g} s before" if longest and seen.doing is not None and seen.doing.step >= 0 else ""


def _kernel(seen: Observed) -> str:
    where = f" in {seen.usage.wchan}" if seen.usage is not None and seen.usage.wchan not in ("", "0") else ""
    return f"state {seen.state or '?'}{where}"


def _waits(waiting: Sequence[int]) -> str:
    workers = [str(worker) for worker in waiting if worker != AGENT]
    agent = "; the job's recovery waits for it" if AGENT in waiting else ""
    if not workers:
        return agent
    *others, last = workers
    names = f"workers {', '.join(others)} and {last} wait" if others else f"worker {last} waits"
    return f"; {names} for it"
