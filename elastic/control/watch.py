"""Looks at the workers of a job regularly, and passes on what `health` finds: sentences for the user, and workers to be replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from elastic.control.state import ControlState
from elastic.control.world import World
from elastic.health.judge import LOOK_S, Judge
from elastic.health.limits import Limits
from elastic.health.verdict import Verdict
from elastic.host.channel import Message


class Watch:
    """Watches the workers of a job whose state is `state()`; calls `exclude` with each verdict that excludes a worker."""

    def __init__(self, world: World, limits: Limits, state: Callable[[], ControlState], exclude: Callable[[Verdict], None]) -> None:
        self._world, self._state, self._exclude = world, state, exclude
        self._judge = Judge(limits)
        self._code: dict[int, str] = {}

    def heard(self, worker: int, message: Message) -> None:
        """Notes the line of user code that a worker reports when it is in one place for long."""
        self._code[worker] = message["code"]

    def look(self) -> None:
        """Looks once, and again every LOOK_S seconds."""
        state = self._state()
        starting = state.starting.difference(state.evicted)
        awaited = {*state.live, *state.participants}.difference(state.finished)
        workers = sorted({*awaited, *starting, *state.ready}.difference(state.dead))
        seen = [replace(each, code=self._code.get(each.worker, "")) for each in self._world.carrier.look(workers)]
        for found in self._judge.look(seen, self._world.clock(), asked=state.missing, starting=starting):
            if found.excludes:
                self._exclude(found)
            else:
                self._world.say(found.sentence)
        self._world.timers.set_timer(LOOK_S, self.look, "watch")

    def close(self) -> None:
        """Ends the looks."""
        self._world.timers.clear_timer("watch")
