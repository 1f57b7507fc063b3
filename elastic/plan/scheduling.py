"""List scheduling: runs a step in simulated time, which yields the schedule.

The result is free of deadlock at any speeds: the simulated run is a valid order of all actions.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from heapq import heappop, heappush

from elastic.plan.actions import Action, ActionKind
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

_BACKWARD, _FORWARD = range(2)
"""Priority among actions that can start at the same time: the one that more others wait for is first."""

_KINDS: tuple[ActionKind, ActionKind] = ("B", "F")

_AT_A_TIME = 128
"""Actions between two points at which a run can yield: about 2 ms."""

_Next = tuple[float, int, int]
"""When a worker can start its next action, its kind, and the worker's place (schedules do not depend on workers' ids)."""


class _SimulatedWorker:
    """The work of one worker, its progress, and the actions it has run. Backwards are in the order of its forwards."""

    __slots__ = (
        "arrived",
        "backwards",
        "bound",
        "forwards",
        "free",
        "id",
        "micro_batches",
        "next",
        "place",
        "ran",
        "seconds",
        "stage",
        "starts",
    )

    def __init__(self, worker: int, place: int, stage: int, seconds: tuple[float, float], bound: int) -> None:
        self.id, self.place, self.stage, self.seconds, self.bound = worker, place, stage, seconds, bound
        self.micro_batches: list[int] = []
        self.arrived: dict[int, float] = {}
        """When the input of each micro-batch's forward arrives, as far as known."""
        self.ran: list[int] = []  # 2 x micro-batch + kind: plain numbers, which the garbage collector ignores
        self.starts: list[float] = []
        self.forwards = self.backwards = 0
        self.free = 0.0
        self.next: _Next | None = None

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions it has run, in order."""
        return tuple(Action(self.stage, _KINDS[number & 1], number >> 1) for number in self.ran)


class Scheduler:
    """Repeatedly runs the earliest possible action of all workers; actions that it enables can only start later."""

    def __init__(self, workload: Workload, routes: Sequence[Sequence[int]], timing: Timing) -> None:
        self.timing, self.last = timing, len(timing.members) - 1
        self._workload, self._routes = workload, routes
        self.workers: dict[int, _SimulatedWorker] = {}
        self.home: list[list[_SimulatedWorker]] = []
        self.gradients: list[list[float]] = []
        """By stage and micro-batch: when the input of the backward arrives, as far as known."""
        self.links: dict[tuple[int, int], tuple[float, float]] = {}
        """By pair of sender and receiver: seconds of a message, and when the link is free."""
        self.agenda: list[_Next] = []

    def _entering(self) -> Generator[None, None, None]:
        """Assigns every worker its micro-batches."""
        workload, timing = self._workload, self.timing
        grains = [workload.grain_of(micro_batch) for micro_batch in range(workload.micro_batches)]
        for stage, (group, route) in enumerate(zip(timing.members, self._routes, strict=True)):
            for worker in group:
                pace = timing.paces[worker]
                self.workers[worker] = _SimulatedWorker(
                    worker, len(self.workers), stage, (pace.backward_s, pace.forward_s), self.last + 1 - stage
                )
            self.home.append([self.workers[route[grain]] for grain in grains])
            for micro_batch, home in enumerate(self.home[stage]):
                home.micro_batches.append(micro_batch)
                if not stage:
                    home.arrived[micro_batch] = 0.0
            self.gradients.append([math.inf] * workload.micro_batches)
            yield

    def running(self) -> Generator[None, None, float]:
        """Runs all actions, yielding after every few hundred. Returns the seconds until the last one ends."""
        yield from self._entering()
        for worker in self.workers.values():
            self._consider(worker)
        yield
        places, agenda = list(self.workers.values()), self.agenda
        while agenda:
            for _ in range(_AT_A_TIME):
                if not agenda:
                    break
                entry = heappop(agenda)
                worker = places[entry[2]]
                if worker.next is entry:
                    worker.next = None
                    self._start(worker, entry[0], entry[1])
            yield
        return max(worker.free for worker in self.workers.values())

    def _start(self, worker: _SimulatedWorker, start: float, what: int) -> None:
        worker.free, stage = start + worker.seconds[what], worker.stage
        if what == _FORWARD:
            micro_batch = worker.micro_batches[worker.forwards]
            worker.forwards += 1
            if stage == self.last:
                self.gradients[stage][micro_batch] = worker.free
            else:
                receiver = self.home[stage + 1][micro_batch]
                receiver.arrived[micro_batch] = self._sent(worker, receiver)
                self._consider(receiver)
        else:
            micro_batch = worker.micro_batches[worker.backwards]
            worker.backwards += 1
            if stage:
                receiver = self.home[stage - 1][micro_batch]
                self.gradients[stage - 1][micro_batch] = self._sent(worker, receiver)
                self._consider(receiver)
        worker.ran.append(micro_batch << 1 | what)
        worker.starts.append(start)
        self._consider(worker)

    def _sent(self, sender: _SimulatedWorker, receiver: _SimulatedWorker) -> float:
        """Returns when a message that is sent now arrives."""
        if self.timing.links is None:
            return sender.free
        pair = sender.id, receiver.id
        seconds, free = self.links.get(pair) or (self.timing.links(*pair), 0.0)
        end = max(free, sender.free) + seconds
        self.links[pair] = seconds, end
        return end

    def _consider(self, worker: _SimulatedWorker) -> None:
        """Updates the earliest action that the worker can start, as far as known."""
        free, forwards, backwards = worker.free, worker.forwards, worker.backwards
        start, what = math.inf, _BACKWARD
        if backwards < forwards:
            start = max(self.gradients[worker.stage][worker.micro_batches[backwards]], free)
        if start > free and forwards - backwards < worker.bound and forwards < len(worker.micro_batches):
            forward = max(worker.arrived.get(worker.micro_batches[forwards], math.inf), free)
            if forward < start:
                start, what = forward, _FORWARD
        if start == math.inf:
            worker.next = None
        elif worker.next is None or worker.next[:2] != (start, what):
            worker.next = start, what, worker.place
            heappush(self.agenda, worker.next)
