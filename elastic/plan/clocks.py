"""Clocks in a plan: one static clock for the GPUs of each stage. Values and the energy of a step; `clock_search` chooses.

A step of T seconds takes, for each GPU, its busy seconds times its watts at that clock, and its idle watts for the rest:

    E = sum over GPUs of  busy_s x (watts - idle_w) + T x idle_w
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from elastic.errors import PlanError
from elastic.plan.clock_least import Speeds
from elastic.plan.fleet import Fleet
from elastic.plan.job_costs import JobCosts
from elastic.plan.plan import Plan, Stage
from elastic.plan.schedule import build
from elastic.plan.step_order import StepOrder
from elastic.plan.workload import Workload

Mode = Literal["speed", "energy"]


class ClockPoint(NamedTuple):
    """A clock (MHz, or any other setting): the time of work as a multiple of that at the usual clock, and watts while computing."""

    mhz: int
    stretch: float
    watts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockChoices:
    """The clocks that a GPU can sustain, descending; `usual` is the one at which it runs when none is chosen, with a stretch of 1.

    Raises PlanError if `usual` is not one of them, a clock occurs twice, or a value cannot be true: clocks and times are above 0, watts at
    least 0, and all are finite.
    """

    points: tuple[ClockPoint, ...]
    usual: int
    idle_w: float

    def __post_init__(self) -> None:
        if self.usual not in {point.mhz for point in self.points}:
            raise PlanError(f"the usual clock {self.usual} is not one of {[point.mhz for point in self.points]}")
        for value in (self.idle_w, *(value for point in self.points for value in point)):
            if not (math.isfinite(value) and value >= 0):
                raise PlanError(f"clocks, times and watts must be finite and not negative, and one is {value}: measure them again")
        clocks = [point.mhz for point in self.points]
        for point in self.points:
            if not (point.mhz > 0 and point.stretch > 0):
                raise PlanError(f"clocks and times must be above 0, and the time at {point.mhz} is {point.stretch}: measure them again")
            if clocks.count(point.mhz) > 1:
                raise PlanError(f"the clock {point.mhz} is there more than once: give one time and power for each clock")

    @property
    def fastest(self) -> ClockPoint:
        return min(self.points, key=lambda point: (point.stretch, point.watts))

    def at(self, mhz: int) -> ClockPoint:
        """Returns the point of a clock. Raises PlanError if there is none."""
        for point in self.points:
            if point.mhz == mhz:
                return point
        raise PlanError(f"{mhz} MHz is not one of the clocks {[point.mhz for point in self.points]}")

    @property
    def useful(self) -> tuple[ClockPoint, ...]:
        """The points of which no other is both as fast and as frugal, fastest first. Time that is saved is spent idle."""
        kept: list[ClockPoint] = []
        for point in sorted(self.points, key=lambda each: (each.stretch, each.stretch * (each.watts - self.idle_w))):
            if not kept or point.stretch * (point.watts - self.idle_w) < kept[-1].stretch * (kept[-1].watts - self.idle_w):
                kept.append(point)
        return tuple(kept)


def common(choices: Sequence[ClockChoices | None]) -> ClockChoices | None:
    """Returns the clocks that all GPUs of a stage have, with the longest time and the mean power; None if any GPU is unknown."""
    known = [each for each in choices if each is not None]
    if not known or len(known) < len(choices) or len({each.usual for each in known}) > 1:
        return None
    clocks = set.intersection(*({point.mhz for point in each.points} for each in known))
    if known[0].usual not in clocks:
        return None
    found = [[each.at(mhz) for each in known] for mhz in sorted(clocks, reverse=True)]
    points = tuple(
        ClockPoint(group[0].mhz, max(point.stretch for point in group), sum(point.watts for point in group) / len(group)) for group in found
    )
    return ClockChoices(points=points, usual=known[0].usual, idle_w=sum(each.idle_w for each in known) / len(known))


class StageWork(NamedTuple):
    """A stage's work at its usual clock: the busy seconds of its busiest GPU and of all its GPUs, and their number."""

    busiest_s: float
    total_s: float
    devices: int


class Steps(Speeds, Protocol):
    """The steps of a plan whose stages take longer or shorter."""

    @property
    def work(self) -> Sequence[StageWork]: ...


class JobSteps(StepOrder):
    """The steps of a job's plan: its workers keep the schedule that is made with the workload's seconds."""

    def __init__(self, workload: Workload, fleet: Fleet, plan: Plan) -> None:
        costs = JobCosts(workload, fleet)
        schedule = build(workload, plan.stages, plan.routes, **plan.order)
        super().__init__(schedule, costs.timing(plan.stages), costs.exchange_s(plan.stages))
        self._workload, self._fleet = workload, fleet
        self.work = tuple(self._work(stage, route) for stage, route in zip(plan.stages, plan.routes, strict=True))

    def _work(self, stage: Stage, route: Sequence[int]) -> StageWork:
        workload, fleet = self._workload, self._fleet
        once_s = sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in stage.layers)
        size = workload.micro_batches // workload.grains
        busy = [once_s * size * sum(worker == to for to in route) * fleet.slowdown(worker) for worker in stage.members]
        return StageWork(max(busy), sum(busy), len(stage.members))


def stretched(fleet: Fleet, factors: Mapping[int, float]) -> Fleet:
    """Returns the fleet with the time of each worker multiplied by its factor, 1 for workers that are not listed."""
    slowdowns = {worker: fleet.slowdown(worker) * factors.get(worker, 1.0) for worker in fleet.workers}
    return replace(fleet, slowdowns={worker: factor for worker, factor in slowdowns.items() if factor != 1.0})


def joules(work: Sequence[StageWork], choices: Sequence[ClockChoices | None], points: Sequence[ClockPoint | None], step_s: float) -> float:
    """Returns the joules of a step, of all stages whose power is known."""
    found = 0.0
    for stage, known, point in zip(work, choices, points, strict=True):
        if known is not None and point is not None:
            found += stage.total_s * point.stretch * (point.watts - known.idle_w) + stage.devices * known.idle_w * step_s
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocked:
    """A clock for each stage (None: it is left as it is), with the predicted seconds and joules of a step."""

    clocks: tuple[int | None, ...]
    step_s: float
    joules: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockPlan:
    """The chosen clocks, a step with the usual clocks, and why. `chosen.clocks` has None for stages that keep their usual clock."""

    mode: Mode
    chosen: Clocked
    usual: Clocked
    why: str

    @property
    def changes(self) -> bool:
        """Whether any clock is to be set."""
        return any(clock is not None for clock in self.chosen.clocks)
