"""Who founds a job: the workers that are to be its first members, and new ones for those that die before that. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from elastic.agent.supervision import WorkerProcess
from elastic.control.transitions import FAILED_JOINS


@dataclass(frozen=True, slots=True, kw_only=True)
class Founders:
    """Their `numbers`, ascending. `first` measures what layers cost, and gives the job's value if no Trainer is made."""

    numbers: tuple[int, ...]
    first: int = 0
    deaths: int = 0

    @classmethod
    def of(cls, workers: int) -> Founders:
        return cls(numbers=tuple(range(workers)))

    def without(self, number: int) -> Founders:
        """A new worker with a new number founds in the place of this one, which has died."""
        new = max(self.numbers) + 1
        numbers = (*(other for other in self.numbers if other != number), new)
        return replace(self, numbers=numbers, first=new if number == self.first else self.first, deaths=self.deaths + 1)


def hindrance(founders: Founders, dead: WorkerProcess, others: Iterable[WorkerProcess], *, respawn: bool) -> str | None:
    """Why a worker that died before the job was founded is not replaced, in words that follow how it died; None if it is."""
    if dead.step is not None or any(other.finished for other in others):
        return ""  # they do without a Trainer: what it did cannot be taken over
    if not respawn:
        return "before the training had begun, and respawn is off"
    if founders.deaths + 1 >= FAILED_JOINS:
        return f"before the training had begun, as {founders.deaths} others did: no more are started"
    return None
