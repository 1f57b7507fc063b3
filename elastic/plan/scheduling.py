"""List scheduling: runs a step in simulated time, which yields the schedule.

The result is free of deadlock at any speeds: the simulated run is a valid order of all actions.

By default a free worker never waits while it can run something. That can be slow where stages or their numbers of workers differ: a worker
that runs a forward just before the gradient of an earlier micro-batch arrives delays all stages below, and again with each micro-batch. A
*patient* worker waits for that gradient once it has as many micro-batches in flight as it may (1F1B's order). With some routes such workers
wait for each other for ever: then the run ends early, and `complete` is false.

An *eager* schedule is one of patient workers that hold more micro-batches (`elastic.plan.eager`).

Micro-batches may be *dealt* out among stages of different widths (`elastic.plan.dealing`): other orders, and more of them in flight.

A backward may be *split* (Qi et al., "Zero Bubble Pipeline Parallelism", 2023): the gradient of the stage's input is computed first, since
the stage below waits for it, and those of its weights when nothing else can be computed. A stage that splits its backwards may hold one
micro-batch more than 1F1B's bound, so none holds more than the first stage does. The first stage does not split: nobody waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from heapq import heappop, heappush

from elastic.plan.actions import Action, ActionKind
from elastic.plan.dealing import bounds, order
from elastic.plan.timing import MemberSeconds, Timing
from elastic.plan.workload import Workload

_BACKWARD, _FORWARD, _INPUT, _WEIGHT = range(4)

_KINDS: tuple[ActionKind, ...] = ("B", "F", "I", "W")

_AT_A_TIME = 128
"""Actions between two points at which a run can yield: about 2 ms."""

_Next = tuple[float, int, int]
"""When a worker can start its next action, its kind, and the worker's place (schedules do not depend on workers' ids)."""


class _SimulatedWorker:
    """The work of one worker, its progress, and the actions it has run. Backwards are in the order of its forwards.

    `seconds` are by kind. `weights` counts the backwards that are over, `backwards` those whose first part is.
    """

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
        "split",
        "stage",
        "starts",
        "weights",
    )

    def __init__(self, worker: int, place: int, stage: int, pace: MemberSeconds, bound: int, split: bool) -> None:
        self.id, self.place, self.stage, self.bound = worker, place, stage, bound
        self.split = split and stage > 0 and pace.weight_s > 0
        self.seconds = pace.backward_s, pace.forward_s, pace.input_s, pace.weight_s
        self.micro_batches: list[int] = []
        self.arrived: dict[int, float] = {}
        """When the input of each micro-batch's forward arrives, as far as known."""
        self.ran: list[int] = []  # 4 x micro-batch + kind: plain numbers, which the garbage collector ignores
        self.starts: list[float] = []
        self.forwards = self.backwards = self.weights = 0
        self.free = 0.0
        self.next: _Next | None = None

    @property
    def both_s(self) -> float:
        """Seconds of a forward and a backward."""
        backward_s, forward_s, input_s, weight_s = self.seconds
        return forward_s + (input_s + weight_s if self.split else backward_s)

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions it has run, in order."""
        return tuple(Action(self.stage, _KINDS[number & 3], number >> 2) for number in self.ran)


class Scheduler:
    """Repeatedly runs the earliest possible action of all workers; actions that it enables can only start later."""

    def __init__(
        self,
        workload: Workload,
        routes: Sequence[Sequence[int]],
        timing: Timing,
        *,
        split: bool = False,
        patient: bool = False,
        dealt: bool = False,
        eager: int = 0,
    ) -> None:
        self.timing, self.last, self._split, self._patient = timing, len(timing.members) - 1, split, patient
        self._workload, self._routes, self._dealt, self._eager = workload, routes, dealt, eager
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
        turns = order(workload, self._routes) if self._dealt else range(workload.micro_batches)
        most = bounds(self._routes, dealt=self._dealt, eager=self._eager)
        yield
        for stage, (group, route) in enumerate(zip(timing.members, self._routes, strict=True)):
            for worker in group:
                self.workers[worker] = _SimulatedWorker(worker, len(self.workers), stage, timing.paces[worker], most[stage], self._split)
            self.home.append([self.workers[route[grain]] for grain in grains])
            for micro_batch in turns:
                home = self.home[stage][micro_batch]
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

    @property
    def complete(self) -> bool:
        """Whether all actions have been run."""
        return all(worker.backwards == len(worker.micro_batches) for worker in self.workers.values())

    @property
    def least_s(self) -> float:
        """Seconds that the step takes at least: a worker computes for its micro-batches, and the first has to come up to it, and the last
        to go down again. Messages take time in addition."""
        below_s = least_s = 0.0
        for group in self.timing.members:
            own = [self.workers[worker] for worker in group if self.workers[worker].micro_batches]
            least_s = max(least_s, below_s + max(len(worker.micro_batches) * worker.both_s for worker in own))
            below_s += min(worker.both_s for worker in own)
        return least_s

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
        elif what == _WEIGHT:
            micro_batch = worker.micro_batches[worker.weights]
            worker.weights += 1
        else:
            micro_batch = worker.micro_batches[worker.backwards]
            worker.backwards += 1
            worker.weights += what == _BACKWARD
            if stage:
                receiver = self.home[stage - 1][micro_batch]
                self.gradients[stage - 1][micro_batch] = self._sent(worker, receiver)
                self._consider(receiver)
        worker.ran.append(micro_batch << 2 | what)
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
        start, what = math.inf, _INPUT if worker.split else _BACKWARD
        waits = forwards - backwards >= worker.bound or forwards == len(worker.micro_batches)
        if backwards < forwards and (waits or not self._patient):
            start = max(self.gradients[worker.stage][worker.micro_batches[backwards]], free)
        room = forwards - backwards < worker.bound and forwards - worker.weights <= worker.bound
        # If backwards are split, a forward is first: the stage above would run out of work before the one below does.
        if (start > free or self._split) and room and forwards < len(worker.micro_batches):
            forward = max(worker.arrived.get(worker.micro_batches[forwards], math.inf), free)
            if forward < start or (forward == start and self._split):
                start, what = forward, _FORWARD
        if start > free and worker.weights < backwards:
            start, what = free, _WEIGHT
        if start == math.inf:
            worker.next = None
        elif worker.next is None or worker.next[:2] != (start, what):
            worker.next = start, what, worker.place
            heappush(self.agenda, worker.next)
