"""Looks at the workers of a job regularly, and passes on what `health` finds: sentences for the user, and workers to be replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from elastic.control.preparing import Timers
from elastic.control.state import ControlState
from elastic.health.evidence import Observed
from elastic.health.judge import LOOK_S, Judge
from elastic.health.limits import Limits
from elastic.health.verdict import Verdict
from elastic.host.channel import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Subjects:
    """The workers to look at: those that others may wait for, those that are `starting`, and those that are ready before they are needed
    (`spares`). The agent lacks answers of those `asked`."""

    awaited: Collection[int] = ()
    asked: Collection[int] = ()
    starting: Collection[int] = ()
    spares: Collection[int] = ()

    @classmethod
    def of(cls, state: ControlState) -> Subjects:
        """Returns those of a job with a view."""
        spares = state.spares.difference(state.participants, state.evicted, state.dead)
        awaited = {*state.live, *state.participants, *state.ready}.difference(state.finished, state.dead, spares)
        starting = state.starting.difference(state.evicted, state.dead)
        return cls(awaited=awaited, asked=state.missing, starting=starting, spares=spares)


class Looks(Protocol):
    """What observes workers: `control.carrier.Carrier` does."""

    def look(self, workers: Iterable[int], /) -> list[Observed]: ...


class Watch:
    """Watches workers from the first call of `look` on, until another one looks with the same timers.

    It calls `exclude` with each verdict that excludes a worker, and `looked` with what each look has seen. `host` returns the host of a
    worker in a job of several, else "".
    """

    def __init__(
        self,
        looks: Looks,
        timers: Timers,
        limits: Limits,
        subjects: Callable[[], Subjects],
        exclude: Callable[[Verdict], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        looked: Callable[[Sequence[Observed]], None] = lambda _: None,
        host: Callable[[int], str] = lambda _: "",
    ) -> None:
        self._looks, self._timers, self._subjects, self._exclude, self._say = looks, timers, subjects, exclude, say
        self._clock, self._judge, self._looked = clock, Judge(limits), looked
        self._host = host
        self._code: dict[int, str] = {}

    def heard(self, worker: int, message: Message) -> None:
        """Notes the line of user code that a worker reports when it is in one place for long."""
        self._code[worker] = message["code"]

    def look(self) -> None:
        """Looks once, and again every LOOK_S seconds."""
        subjects = self._subjects()
        workers = sorted({*subjects.awaited, *subjects.starting, *subjects.spares})
        looks = self._looks.look(workers)
        seen = [replace(each, code=self._code[each.worker]) if each.worker in self._code else each for each in looks]
        self._looked(seen)
        roles = {"asked": subjects.asked, "starting": subjects.starting, "spares": subjects.spares}
        for found in self._judge.look(seen, self._clock(), **roles):
            if found.excludes:
                self._exclude(found)
            else:
                self._say(replace(found, host=self._host(found.worker)).sentence)
        self._timers.set_timer(LOOK_S, self.look, "watch")

    def close(self) -> None:
        """Ends the looks."""
        self._timers.clear_timer("watch")
