"""List scheduling: runs a step in simulated time, and so makes the schedule.

Whatever it makes is free of deadlock, at any speeds: the simulated run is an order in which everything could be run. That the run itself
does not get stuck is shown in `elastic.plan.policy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush

from elastic.plan.actions import Action, Kind
from elastic.plan.policy import Policy, ranking
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

_BACKWARD, _FORWARD, _WEIGHTS = range(3)
"""Of what can start at the same time, that which others wait for more comes first."""

_Next = tuple[float, int, int]
"""When a worker can start what it runs next, what that is, and the worker."""


class _Worker:
    """One worker's micro-batches in order, how far it is, and what it has run."""

    __slots__ = ("actions", "backwards", "forwards", "free", "held", "id", "in_flight", "next", "queue", "seconds", "stage", "weights")

    def __init__(self, worker: int, stage: int, seconds: tuple[float, float, float], in_flight: int, held: int) -> None:
        self.id, self.stage, self.seconds, self.in_flight, self.held = worker, stage, seconds, in_flight, held
        self.queue: list[int] = []
        self.actions: list[Action] = []
        self.forwards = self.backwards = self.weights = 0
        self.free = 0.0
        self.next: _Next | None = None


class Scheduler:
    """Runs the earliest possible action of all workers, again and again; what it enables can only start later."""

    def __init__(self, workload: Workload, routes: Sequence[Sequence[int]], timing: Timing, policy: Policy) -> None:
        self.timing, self.split, self.patience = timing, policy.split, policy.patience
        self.forward_first = policy.first == "forward"
        self.last = len(timing.members) - 1
        self.kinds: tuple[Kind, Kind, Kind] = ("I" if policy.split else "B", "F", "W")
        bounds = zip(*policy.bounds(len(timing.members)), strict=True)
        self.workers: dict[int, _Worker] = {}
        for stage, (group, (in_flight, held)) in enumerate(zip(timing.members, bounds, strict=True)):
            for worker in group:
                self.workers[worker] = _Worker(worker, stage, self._seconds(worker), in_flight, held)
        grains = [workload.grain_of(micro_batch) for micro_batch in range(workload.micro_batches)]
        self.home = [[self.workers[route[grain]] for grain in grains] for route in routes]
        for micro_batch in ranking(policy.order, [[route[grain] for grain in grains] for route in routes]):
            for row in self.home:
                row[micro_batch].queue.append(micro_batch)
        never = [math.inf] * workload.micro_batches
        self.activations = [[0.0] * workload.micro_batches, *([*never] for _ in range(self.last))]
        """When the input of each stage's forward of each micro-batch is there, as far as it is known; and so for gradients."""
        self.gradients = [[*never] for _ in timing.members]
        self.links: dict[tuple[int, int], tuple[float, float]] = {}
        """Of each pair that has sent: seconds of a message, and when the link is free."""
        self.agenda: list[_Next] = []

    def _seconds(self, worker: int) -> tuple[float, float, float]:
        pace = self.timing.paces[worker]
        return pace.inputs_s if self.split else pace.backward_s, pace.forward_s, pace.weights_s

    def run(self) -> float:
        """Runs everything; the seconds until the last action ends."""
        for worker in self.workers.values():
            self._consider(worker)
        while self.agenda:
            entry = heappop(self.agenda)
            worker = self.workers[entry[2]]
            if worker.next is entry:
                worker.next = None
                self._start(worker, entry[0], entry[1])
        return max(worker.free for worker in self.workers.values())

    def _start(self, worker: _Worker, start: float, what: int) -> None:
        worker.free = end = start + worker.seconds[what]
        stage = worker.stage
        if what == _FORWARD:
            micro_batch = worker.queue[worker.forwards]
            worker.forwards += 1
            if stage == self.last:
                self.gradients[stage][micro_batch] = end
            else:
                self._send(worker, micro_batch, stage + 1, self.activations)
        elif what == _BACKWARD:
            micro_batch = worker.queue[worker.backwards]
            worker.backwards += 1
            if stage:
                self._send(worker, micro_batch, stage - 1, self.gradients)
        else:
            micro_batch = worker.queue[worker.weights]
        if what == _WEIGHTS or (what == _BACKWARD and not self.split):
            worker.weights += 1
        worker.actions.append(Action(stage, self.kinds[what], micro_batch))
        self._consider(worker)

    def _send(self, sender: _Worker, micro_batch: int, stage: int, arrivals: list[list[float]]) -> None:
        receiver = self.home[stage][micro_batch]
        if self.timing.links is None:
            arrivals[stage][micro_batch] = sender.free
        else:
            pair = sender.id, receiver.id
            seconds, free = self.links.get(pair) or (self.timing.link_s(*pair), 0.0)
            arrivals[stage][micro_batch] = end = max(free, sender.free) + seconds
            self.links[pair] = seconds, end
        self._consider(receiver)

    def _consider(self, worker: _Worker) -> None:
        """Notes the earliest action that the worker can start, as far as it is known by now."""
        free, forwards, backwards = worker.free, worker.forwards, worker.backwards
        backward = forward = math.inf
        due = False
        if backwards < forwards:
            backward = max(self.gradients[worker.stage][worker.queue[backwards]], free)
        if (self.forward_first or backward > free) and forwards < len(worker.queue) and forwards - backwards < worker.in_flight:
            forward = max(self.activations[worker.stage][worker.queue[forwards]], free)
            if forwards - worker.weights == worker.held:
                due, forward = forward == free, math.inf
        what = _FORWARD if forward < backward or (self.forward_first and forward == backward) else _BACKWARD
        start = min(forward, backward)
        if worker.weights < backwards:
            patience = 0.0 if due else self.patience * worker.seconds[_WEIGHTS]
            if start > free + patience or (due and self.forward_first):
                start, what = free, _WEIGHTS
        if start == math.inf:
            worker.next = None
        elif worker.next is None or worker.next[:2] != (start, what):
            worker.next = start, what, worker.id
            heappush(self.agenda, worker.next)
