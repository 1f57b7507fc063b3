"""Who does not move, as one sentence: what it was doing, and since when. It decides nothing: it only says whom the others wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.observe.activity import Doing

LOOK_S = 1.0
STOPPED_S = 2.0
"""How long a stopped process may be silent."""

COMPUTING_S = 10.0
"""How long a worker may compute one micro-batch of one stage: a model that is compiled first takes longer, and is only named."""

_COMPUTING = ("forward", "backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentWorker:
    """A worker as it was found: whether its process is stopped, and what it entered last, None if it left no word."""

    worker: int
    pid: int | None
    stopped: bool
    doing: Doing | None


class Silence:
    """What was said already: each silence is named once, with the one that has been silent longest, since the others wait for it."""

    def __init__(self) -> None:
        self._stopped_at: dict[tuple[int, float], float] = {}
        self._said: set[tuple[int, float]] = set()

    def sentences(self, seen: Sequence[SilentWorker], now: float) -> list[str]:
        """What there is to say of these workers at the time `now`, in seconds of time.monotonic()."""
        stopped = [each for each in seen if each.stopped]
        self._stopped_at = {_key(each): self._stopped_at.get(_key(each), now) for each in stopped}
        lasting = [each for each in stopped if now - self._stopped_at[_key(each)] >= STOPPED_S]
        slow = [each for each in seen if each.doing is not None and each.doing.phase in _COMPUTING and now - each.doing.at >= COMPUTING_S]
        silent = lasting or sorted(slow, key=lambda each: _key(each)[1])[:1]
        told = [each for each in silent if _key(each) not in self._said]
        self._said = {_key(each) for each in silent}
        return [_sentence(each, now) for each in told]


def _key(seen: SilentWorker) -> tuple[int, float]:
    """The worker, and when it entered what it is in: a silence ends with that."""
    return seen.worker, 0.0 if seen.doing is None else seen.doing.at


def _sentence(seen: SilentWorker, now: float) -> str:
    who = f"worker {seen.worker} (process {seen.pid})"
    what = "its process is stopped, and the others wait for it" if seen.stopped else "the others wait for it"
    if seen.doing is None:
        return f"{who} does not answer: {what}"
    step = f" of step {seen.doing.step}" if seen.doing.step >= 0 else ""
    part = f", micro-batch {seen.doing.micro_batch}" if seen.doing.micro_batch >= 0 else ""
    return f"{who} does not answer: it is in {seen.doing.phase}{step}{part} since {now - seen.doing.at:.1f} s; {what}"
