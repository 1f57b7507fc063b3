"""Describes silent workers in a sentence: what one was doing, and since when; and says whose process has been stopped for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.observe.activity import Doing

LOOK_S = 0.5
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
        self._stopped: dict[int, tuple[float, SilentWorker]] = {}

    def sentences(self, seen: Sequence[SilentWorker], now: float) -> list[str]:
        """Returns the new sentences about these workers at the time `now`, in seconds of time.monotonic()."""
        stopped = [each for each in seen if each.stopped]
        self._stopped_at = {_key(each): self._stopped_at.get(_key(each), now) for each in stopped}
        lasting = [each for each in stopped if now - self._stopped_at[_key(each)] >= STOPPED_S]
        slow = [each for each in seen if each.doing is not None and each.doing.phase in _COMPUTING and now - each.doing.at >= COMPUTING_S]
        silent = lasting or sorted(slow, key=lambda each: _key(each)[1])[:1]
        self._stopped = {each.worker: (self._stopped_at[_key(each)], each) for each in stopped}
        new = [each for each in silent if _key(each) not in self._said]
        self._said = {_key(each) for each in silent}
        return [_sentence(each, now) for each in new]

    def stopped(self, least_s: float, now: float) -> dict[int, str]:
        """Returns, of the workers that `sentences` was given last, those stopped for at least `least_s`, and what is wrong with each."""
        lasting = {worker: found for worker, found in self._stopped.items() if now - found[0] >= least_s}
        return {worker: f"its process has been stopped for {now - at:.1f} s{_since(seen)}" for worker, (at, seen) in lasting.items()}


def _since(seen: SilentWorker) -> str:
    if seen.doing is None:
        return ""
    return f", in {seen.doing.phase}{_place(seen.doing)}"


def _place(doing: Doing) -> str:
    step = f" of step {doing.step}" if doing.step >= 0 else ""
    return step + (f", micro-batch {doing.micro_batch}" if doing.micro_batch >= 0 else "")


def _key(seen: SilentWorker) -> tuple[int, float]:
    """The worker, and when its last activity began: a new activity ends the silence."""
    return seen.worker, 0.0 if seen.doing is None else seen.doing.at


def _sentence(seen: SilentWorker, now: float) -> str:
    who = f"worker {seen.worker} (process {seen.pid})"
    what = "its process is stopped, and the others wait for it" if seen.stopped else "the others wait for it"
    if seen.doing is None:
        return f"{who} makes no progress: {what}"
    return f"{who} makes no progress: it has been in {seen.doing.phase}{_place(seen.doing)} for {now - seen.doing.at:.1f} s; {what}"
