"""List scheduling: runs a step in simulated time, and so makes the schedule.

Whatever it makes is free of deadlock, at any speeds: the simulated run is an order in which everything could be run. That the run itself
does not get stuck is shown in `elastic.plan.policy`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from heapq import heappop, heappush

from elastic.plan.actions import Action, Kind
from elastic.plan.arrivals import AsTheyArrive, InOrder
from elastic.plan.policy import Policy, ranking
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

_BACKWARD, _FORWARD, _WEIGHTS = range(3)
"""Of what can start at the same time, that which others wait for more comes first."""

_AT_A_TIME = 128
"""Actions between two places at which a run can be left off: about 2 ms."""

_Next = tuple[float, int, int]
"""When a worker can start what it runs next, what that is, and the worker's place: a schedule does not depend on workers' names."""


class _Worker:
    """What a worker has to do, how far it is, and what it has run; backwards are in the order of its forwards."""

    __slots__ = (
        "actions",
        "arrivals",
        "backwards",
        "free",
        "held",
        "id",
        "in_flight",
        "next",
        "place",
        "queue",
        "seconds",
        "stage",
        "weights",
    )

    def __init__(
        self,
        worker: int,
        place: int,
        stage: int,
        seconds: tuple[float, float, float],
        bounds: tuple[int, int],
        arrivals: InOrder | AsTheyArrive,
    ) -> None:
        self.id, self.place, self.stage, self.seconds, self.arrivals = worker, place, stage, seconds, arrivals
        self.in_flight, self.held = bounds
        self.actions: list[Action] = []
        self.queue: list[int] = []
        """The micro-batches whose forwards were started; of these, so many backwards, and parts for weights."""
        self.backwards = self.weights = 0
        self.free = 0.0
        self.next: _Next | None = None


class Scheduler:
    """Runs the earliest possible action of all workers, again and again; what it enables can only start later."""

    def __init__(self, workload: Workload, routes: Sequence[Sequence[int]], timing: Timing, policy: Policy) -> None:
        self.timing, self.split, self.patience = timing, policy.split, policy.patience
        self.forward_first = policy.first == "forward"
        self.last = len(timing.members) - 1
        self.kinds: tuple[Kind, Kind, Kind] = ("I" if policy.split else "B", "F", "W")
        grains = [workload.grain_of(micro_batch) for micro_batch in range(workload.micro_batches)]
        homes = [[route[grain] for grain in grains] for route in routes]
        self.order = ranking(policy.order, homes)
        self.rank = {micro_batch: rank for rank, micro_batch in enumerate(self.order)}
        self.workers = self._workers(policy, homes)
        self.home = [[self.workers[worker] for worker in row] for row in homes]
        self.gradients = [[math.inf] * workload.micro_batches for _ in timing.members]
        """When what each stage's backward of each micro-batch needs is there, as far as it is known."""
        self.links: dict[tuple[int, int], tuple[float, float]] = {}
        """Of each pair that has sent: seconds of a message, and when the link is free."""
        self.agenda: list[_Next] = []

    def _workers(self, policy: Policy, homes: Sequence[Sequence[int]]) -> dict[int, _Worker]:
        found: dict[int, _Worker] = {}
        bounds = zip(*policy.bounds(len(self.timing.members)), strict=True)
        for stage, (group, bound) in enumerate(zip(self.timing.members, bounds, strict=True)):
            ranks: dict[int, list[int]] = {worker: [] for worker in group}
            for rank, micro_batch in enumerate(self.order):
                ranks[homes[stage][micro_batch]].append(rank)
            for worker in group:
                arrivals = AsTheyArrive() if policy.order == "arriving" else InOrder(ranks[worker])
                found[worker] = _Worker(worker, len(found), stage, self._seconds(worker), bound, arrivals)
                for rank in ranks[worker] if stage == 0 else ():
                    arrivals.put(rank, 0.0)
        return found

    def _seconds(self, worker: int) -> tuple[float, float, float]:
        pace = self.timing.paces[worker]
        return pace.inputs_s if self.split else pace.backward_s, pace.forward_s, pace.weights_s

    def running(self) -> Generator[None, None, float]:
        """Runs everything, and can be left off after every few hundred actions; the seconds until the last action ends."""
        for worker in self.workers.values():
            self._consider(worker)
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

    def _start(self, worker: _Worker, start: float, what: int) -> None:
        before, worker.free = worker.free, start + worker.seconds[what]
        stage = worker.stage
        if what == _FORWARD:
            micro_batch = self.order[worker.arrivals.pop(before)]
            worker.queue.append(micro_batch)
            self._send_activations(worker, micro_batch)
        elif what == _BACKWARD:
            micro_batch = worker.queue[worker.backwards]
            worker.backwards += 1
            if stage:
                receiver = self.home[stage - 1][micro_batch]
                self.gradients[stage - 1][micro_batch] = self._sent(worker, receiver)
                self._consider(receiver)
        else:
            micro_batch = worker.queue[worker.weights]
        if what == _WEIGHTS or (what == _BACKWARD and not self.split):
            worker.weights += 1
        worker.actions.append(Action(stage, self.kinds[what], micro_batch))
        self._consider(worker)

    def _send_activations(self, worker: _Worker, micro_batch: int) -> None:
        if worker.stage == self.last:
            self.gradients[worker.stage][micro_batch] = worker.free
        else:
            receiver = self.home[worker.stage + 1][micro_batch]
            receiver.arrivals.put(self.rank[micro_batch], self._sent(worker, receiver))
            self._consider(receiver)

    def _sent(self, sender: _Worker, receiver: _Worker) -> float:
        """When a message that is sent now arrives."""
        if self.timing.links is None:
            return sender.free
        pair = sender.id, receiver.id
        seconds, free = self.links.get(pair) or (self.timing.link_s(*pair), 0.0)
        end = max(free, sender.free) + seconds
        self.links[pair] = seconds, end
        return end

    def _consider(self, worker: _Worker) -> None:
        """Notes the earliest action that the worker can start, as far as it is known by now."""
        free, forwards, backwards = worker.free, len(worker.queue), worker.backwards
        backward = forward = math.inf
        due = False
        if backwards < forwards:
            backward = max(self.gradients[worker.stage][worker.queue[backwards]], free)
        if (self.forward_first or backward > free) and forwards - backwards < worker.in_flight:
            forward = worker.arrivals.ready_s(free)
            if forwards - worker.weights == worker.held:
                due, forward = forward == free, math.inf
        what = _FORWARD if forward < backward or (self.forward_first and forward == backward) else _BACKWARD
        start = min(forward, backward)
        if worker.weights < backwards:
            patience = 0.0 if due else self.patience * worker.seconds[_WEIGHTS]
            if start > free + patience:
                start, what = free, _WEIGHTS
        if start == math.inf:
            worker.next = None
        elif worker.next is None or worker.next[:2] != (start, what):
            worker.next = start, what, worker.place
            heappush(self.agenda, worker.next)
