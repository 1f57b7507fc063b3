"""A discrete-event simulation of one step: it makes the schedule, and it is the judge of how long a plan takes."""

from __future__ import annotations

from collections.abc import Sequence

from elastic.plan.actions import Action, Kind, awaited
from elastic.plan.plan import Stage
from elastic.plan.workload import Workload


def simulate(workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> tuple[dict[int, tuple[Action, ...]], float]:
    """The schedule (see `elastic.plan.schedule.build`) and the seconds until its last action ends; transfers between workers are free."""
    simulation = _Simulation(workload, stages, routes)
    while simulation.advance():
        pass
    return {worker: tuple(actions) for worker, actions in simulation.lists.items()}, max(simulation.free.values())


class _Simulation:
    """Runs the earliest possible action of all workers, again and again; what it enables can only start later."""

    def __init__(self, workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> None:
        self.depth = len(stages)
        self.seconds = {
            "F": [sum(workload.layers[layer].forward_s for layer in stage.layers) for stage in stages],
            "B": [sum(workload.layers[layer].backward_s for layer in stage.layers) for stage in stages],
        }
        self.worker = [[route[workload.grain_of(m)] for m in range(workload.micro_batches)] for route in routes]
        self.stage = {worker: number for number, stage in enumerate(stages) for worker in stage.members}
        self.todo = {worker: [m for m, to in enumerate(self.worker[stage]) if to == worker] for worker, stage in self.stage.items()}
        self.lists: dict[int, list[Action]] = {worker: [] for worker in self.stage}
        self.forwards, self.backwards = dict.fromkeys(self.stage, 0), dict.fromkeys(self.stage, 0)
        self.free = dict.fromkeys(self.stage, 0.0)
        self.ended: dict[Action, float] = {}
        self.next: dict[int, tuple[float, Kind, int]] = {}
        for worker in self.stage:
            self._consider(worker)

    def advance(self) -> bool:
        """Runs one action; False when none is left."""
        if not self.next:
            return False
        start, kind, worker = min(self.next.values())
        stage, done = self.stage[worker], self.forwards if kind == "F" else self.backwards
        micro_batch = self.todo[worker][done[worker]]
        done[worker] += 1
        action = Action(stage, kind, micro_batch)
        self.lists[worker].append(action)
        self.free[worker] = self.ended[action] = start + self.seconds[kind][stage]
        self._consider(worker)
        follower = stage + 1 if kind == "F" else stage - 1
        if 0 <= follower < self.depth:
            self._consider(self.worker[follower][micro_batch])
        return True

    def _consider(self, worker: int) -> None:
        """Notes the earliest action that the worker can start, as far as it is known by now. B sorts before F."""
        forwards, backwards = self.forwards[worker], self.backwards[worker]
        todo, possible = self.todo[worker], []
        if backwards < forwards:
            possible.append(self._start(worker, "B", todo[backwards]))
        if forwards < len(todo) and forwards - backwards < self.depth - self.stage[worker]:
            possible.append(self._start(worker, "F", todo[forwards]))
        known = [(start, kind, worker) for start, kind in possible if start is not None]
        if known:
            self.next[worker] = min(known)
        else:
            self.next.pop(worker, None)

    def _start(self, worker: int, kind: Kind, micro_batch: int) -> tuple[float | None, Kind]:
        before = awaited(Action(self.stage[worker], kind, micro_batch), self.depth)
        ready = 0.0 if before is None else self.ended.get(before)
        return (None if ready is None else max(ready, self.free[worker])), kind
