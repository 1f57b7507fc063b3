"""Describes silent workers in a sentence: what one was doing, and since when. This is for information only: it decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.observe.activity import Doing

LOOK_S = 1.0
STOPPED_S = 2.0
"""How long a process may be stopped before it is reported."""

COMPUTING_S = 10.0
"""How long a worker may compute one micro-batch of one stage before it is reported. A model that is compiled first takes longer."""

_COMPUTING = ("forward", "backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentWorker:
    """An observation of a worker: whether its process is stopped, and its last activity, None without a record."""

    worker: int
    pid: int | None
    stopped: bool
    doing: Doing | None


class Silence:
    """Reports each silence once: stopped processes, else the worker that has been silent longest, since the others wait for it."""

    def __init__(self) -> None:
        self._stopped_at: dict[tuple[int, float], float] = {}
        self._said: set[tuple[int, float]] = set()

    def sentences(self, seen: Sequence[SilentWorker], now: float) -> list[str]:
        """Returns the new sentences about these workers at the time `now`, in seconds of time.monotonic()."""
        stopped = [each for each in seen if each.stopped]
        self._stopped_at = {_key(each): self._stopped_at.get(_key(each), now) for each in stopped}
        lasting = [each for each in stopped if now - self._stopped_at[_key(each)] >= STOPPED_S]
        slow = [each for each in seen if each.doing is not None and each.doing.phase in _COMPUTING and now - each.doing.at >= COMPUTING_S]
        silent = lasting or sorted(slow, key=lambda each: _key(each)[1])[:1]
        new = [each for each in silent if _key(each) not in self._said]
        self._said = {_key(each) for each in silent}
        return [_sentence(each, now) for each in new]


def _key(seen: SilentWorker) -> tuple[int, float]:
    """The worker, and when its last activity began: a new activity ends the silence."""
    return seen.worker, 0.0 if seen.doing is None else seen.doing.at


def _sentence(seen: SilentWorker, now: float) -> str:
    who = f"worker {seen.worker} (process {seen.pid})"
    what = "its process is stopped, and the others wait for it" if seen.stopped else "the others wait for it"
    if seen.doing is None:
        return f"{who} makes no progress: {what}"
    step = f" of step {seen.doing.step}" if seen.doing.step >= 0 else ""
    part = f", micro-batch {seen.doing.micro_batch}" if seen.doing.micro_batch >= 0 else ""
    return f"{who} makes no progress: it has been in {seen.doing.phase}{step}{part} for {now - seen.doing.at:.1f} s; {what}"
