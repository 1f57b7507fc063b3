"""The founders of a job: the workers for its first view, and replacements for those that die, or never are ready, before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from elastic.agent.supervision import WorkerProcess
from elastic.control.preparing import Timers
from elastic.control.transitions import FAILED_JOINS
from elastic.control.watch import Looks, Subjects, Watch
from elastic.health.limits import Limits
from elastic.observe.console import say
from elastic.settings import JobSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Founders:
    """The founders' `numbers`, ascending. `first` measures the layers, and returns the job's value if no Trainer is made."""

    numbers: tuple[int, ...]
    first: int = 0
    deaths: int = 0

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Founders:
        return cls(numbers=tuple(numbers))

    def without(self, number: int) -> Founders:
        """Returns founders with a new worker, with a new number, in the place of this one, which has died."""
        new = max(self.numbers) + 1
        numbers = (*(other for other in self.numbers if other != number), new)
        return replace(self, numbers=numbers, first=new if number == self.first else self.first, deaths=self.deaths + 1)


def watched(
    looks: Looks,
    timers: Timers,
    settings: JobSettings,
    founders: Callable[[], Sequence[WorkerProcess]],
    exclude: Callable[[int, str], None],
) -> Watch:
    """Returns a watch of founders: once one is ready, the others must not be stopped, or sleep, for ever. A driver's watch replaces it."""

    def subjects() -> Subjects:
        present = [each for each in founders() if not (each.ended or each.finished or each.condemned)]
        born = {each.number for each in present if each.announced is None}
        ready = {each.number for each in present} - born
        return Subjects(awaited=ready, starting=born) if ready and born else Subjects()

    return Watch(looks, timers, Limits.of(settings), subjects, lambda found: exclude(found.worker, f"{found.kind}: {found.why}"), say)


def hindrance(founders: Founders, dead: WorkerProcess, others: Iterable[WorkerProcess], *, respawn: bool) -> str | None:
    """Returns why a worker that died before the first view is not replaced, as a continuation of `how_ended`; None if it is replaced."""
    if dead.step is not None or any(other.finished for other in others):
        return ""  # they use no Trainer: another worker cannot take over its work
    if not respawn:
        return "before training began, and respawn is off"
    if founders.deaths + 1 >= FAILED_JOINS:
        return f"before training began, as {founders.deaths} others did: no more are started"
    return None
