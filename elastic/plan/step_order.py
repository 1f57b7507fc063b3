"""The seconds of a step whose workers keep the order of their actions, for many speeds of its stages at once.

A worker's schedule is made with the workload's seconds, and stays when clocks change. With a fixed order the end of each action is the
latest of what it waits for, plus its own seconds; so no step becomes shorter when a stage becomes slower, which a search can rely on. (A
schedule that is made again for each speed can.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from elastic.plan.actions import Action, Schedule
from elastic.plan.timing import Timing

_AT_ONCE = 8192
"""Combinations that are computed together: the ends of all actions are kept for each."""


_Key = tuple[int, str, int]
"""Stage, kind and micro-batch of an action."""


class _Run(NamedTuple):
    """One action: its worker and stage, its seconds at the usual speed, the action whose message it needs, and seconds of that message."""

    worker: int
    stage: int
    seconds: float
    source: int | None
    link_s: float
    link: tuple[int, int]


class Path(NamedTuple):
    """A chain of actions through a step: at any speeds the step takes `fixed_s` + sum over stages of `busy_s` x stretch at least."""

    busy_s: tuple[float, ...]
    fixed_s: float


class _Chain(NamedTuple):
    """The longest chain up to some event: when it ends, the seconds of its actions by stage (at the usual speed), and of its messages."""

    end_s: float
    busy_s: tuple[float, ...]
    fixed_s: float

    def work(self, stage: int, seconds: float, stretch: float) -> _Chain:
        busy_s = (*self.busy_s[:stage], self.busy_s[stage] + seconds, *self.busy_s[stage + 1 :])
        return _Chain(self.end_s + seconds * stretch, busy_s, self.fixed_s)

    def later(self, seconds: float) -> _Chain:
        return _Chain(self.end_s + seconds, self.busy_s, self.fixed_s + seconds)


def _end(chain: _Chain) -> float:
    return chain.end_s


_Steps = TypeVar("_Steps", bound="StepOrder")


class StepOrder:
    """A schedule with its timing. `extra_s` is added to every step: what no clock changes."""

    def __init__(self, schedule: Schedule, timing: Timing, extra_s: float = 0.0) -> None:
        self._timing, self._extra_s = timing, extra_s
        self._runs = _ordered(schedule, timing)
        self._last_use = {run.source: place for place, run in enumerate(self._runs) if run.source is not None}

    def delayed(self: _Steps, message_s: float) -> _Steps:
        """Returns the same steps in which every message between stages takes `message_s` seconds longer."""
        found = copy.copy(self)
        found._runs = [run if run.source is None else run._replace(link_s=run.link_s + message_s) for run in self._runs]
        return found

    @property
    def actions(self) -> int:
        """The number of actions, which the time of an evaluation follows."""
        return len(self._runs)

    def steps_s(self, stretches: Sequence[Sequence[float]]) -> list[float]:
        """Returns the seconds of the step for each combination: how many times as long each stage's work takes."""
        found: list[float] = []
        for first in range(0, len(stretches), _AT_ONCE):
            found += self._some(np.array(stretches[first : first + _AT_ONCE], dtype=float)).tolist()
        return found

    def longest(self, stretches: Sequence[float]) -> Path:
        """Returns the chain of actions and messages that determines the seconds of one combination."""
        free: dict[int, _Chain] = {}
        links: dict[tuple[int, int], _Chain] = {}
        ends: dict[int, _Chain] = {}
        start = _Chain(0.0, (0.0,) * len(stretches), 0.0)
        for place, run in enumerate(self._runs):
            chain = free.get(run.worker, start)
            if run.source is not None:
                arrived = ends[run.source]
                if run.link_s:
                    arrived = max(arrived, links.get(run.link, start), key=_end).later(run.link_s)
                    links[run.link] = arrived
                chain = max(chain, arrived, key=_end)
            free[run.worker] = chain.work(run.stage, run.seconds, stretches[run.stage])
            if place in self._last_use:
                ends[place] = free[run.worker]
        chain = max(self._chains(free, stretches), key=_end)
        return Path(chain.busy_s, chain.fixed_s + self._extra_s)

    def _chains(self, free: Mapping[int, _Chain], stretches: Sequence[float]) -> Iterator[_Chain]:
        for stage, (members, sync_s) in enumerate(zip(self._timing.members, self._timing.sync_s, strict=True)):
            ran = {worker: free[worker] for worker in members if worker in free}
            together = max(ran.values(), key=_end, default=None)
            for worker, chain in ran.items():
                over = together.later(sync_s) if sync_s and together is not None else chain
                yield over.work(stage, self._timing.paces[worker].update_s, stretches[stage])

    def _some(self, stretches: np.ndarray) -> np.ndarray:
        columns = [stretches[:, stage] for stage in range(stretches.shape[1])]
        free: dict[int, np.ndarray] = {}
        ends: dict[int, np.ndarray] = {}
        links: dict[tuple[int, int], np.ndarray] = {}
        for place, run in enumerate(self._runs):
            took = run.seconds * columns[run.stage]
            start = free.get(run.worker)
            if run.source is not None:
                arrived = ends.pop(run.source) if self._last_use[run.source] == place else ends[run.source]
                if run.link_s:  # a link carries one message at a time
                    arrived = (np.maximum(arrived, links[run.link]) if run.link in links else arrived) + run.link_s
                    links[run.link] = arrived
                start = arrived if start is None else np.maximum(start, arrived)
            free[run.worker] = took if start is None else start + took
            if place in self._last_use:
                ends[place] = free[run.worker]
        return self._ended(free, columns) + self._extra_s

    def _ended(self, free: Mapping[int, np.ndarray], columns: Sequence[np.ndarray]) -> np.ndarray:
        """Adds each stage's synchronisation, which waits for all its members if it takes time, and the updates."""
        over: list[np.ndarray] = []
        for stage, (members, sync_s) in enumerate(zip(self._timing.members, self._timing.sync_s, strict=True)):
            ran = {worker: free[worker] for worker in members if worker in free}
            if sync_s and ran:
                together = np.max(list(ran.values()), axis=0) + sync_s
                ran = {worker: together for worker in ran}  # noqa: C420
            over += [end + self._timing.paces[worker].update_s * columns[stage] for worker, end in ran.items()]
        return np.max(over, axis=0)


def _ordered(schedule: Schedule, timing: Timing) -> list[_Run]:
    """Returns all actions so that each comes after those that it waits for."""
    homes = {_key(action): worker for worker, actions in schedule.items() for action in actions}
    left = {worker: list(reversed(actions)) for worker, actions in schedule.items()}
    places: dict[_Key, int] = {}
    runs: list[_Run] = []
    moved = True
    while moved:
        moved = False
        for worker, actions in left.items():
            while actions and ((source := _source(actions[-1], homes)) is None or source in places):
                action = actions.pop()
                places[_key(action)] = len(runs)
                sender = worker if source is None else homes[source]
                runs.append(_run(worker, action, timing, None if source is None else places[source], sender))
                moved = True
    return runs


def _key(action: Action) -> _Key:
    return action.stage, action.kind, action.micro_batch


def _source(action: Action, homes: Mapping[_Key, int]) -> _Key | None:
    """Returns the action of another stage whose result is needed; None if there is none."""
    if action.kind == "F":
        return (action.stage - 1, "F", action.micro_batch) if action.stage else None
    for kind in ("B", "I") if action.kind != "W" else ():
        if (source := (action.stage + 1, kind, action.micro_batch)) in homes:
            return source
    return None


def _run(worker: int, action: Action, timing: Timing, source: int | None, sender: int) -> _Run:
    pace = timing.paces[worker]
    seconds = {"F": pace.forward_s, "B": pace.backward_s, "I": pace.input_s, "W": pace.weight_s}[action.kind]
    link_s = timing.links(sender, worker) if source is not None and timing.links is not None else 0.0
    return _Run(worker, action.stage, seconds, source, link_s, (sender, worker))
