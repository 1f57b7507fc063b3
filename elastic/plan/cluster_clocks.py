"""Clocks for a plan of a cluster on paper: its steps, simulated, in the form that `clock_search` takes."""

from __future__ import annotations

from collections.abc import Mapping

from elastic.plan.clock_search import ClockSearch
from elastic.plan.clocks import ClockChoices, StageWork, common
from elastic.plan.division.division import Division
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.picture import timed
from elastic.plan.simulation import simulate
from elastic.plan.step_order import StepOrder
from elastic.plan.timing import MemberSeconds


class ClusterSteps(StepOrder):
    """The steps of a division. All replicas are equal, so the first one is simulated; its schedule is that of the usual clocks."""

    def __init__(self, division: Division, rules: PhysicalRules) -> None:
        step = timed(division, rules, 1)
        super().__init__(simulate(step.workload, step.stages, step.routes, step.timing)[0], step.timing)
        paces = [step.timing.paces[stage.members[0]] for stage in step.stages]
        self.work = tuple(_work(division, number, pace) for number, pace in enumerate(paces))


def _work(division: Division, number: int, pace: MemberSeconds) -> StageWork:
    busy_s = (pace.forward_s + pace.backward_s) * division.micro_batches + pace.update_s
    devices = sum(shape.tp for shape in division.stages[number].makeup.each())
    return StageWork(busiest_s=busy_s, total_s=busy_s * devices, devices=devices)


def clocks_of(division: Division, rules: PhysicalRules, kinds: Mapping[str, ClockChoices]) -> ClockSearch:
    """Returns the search for the clocks of a division, with the clocks of each kind of device; stages of other kinds keep theirs."""
    choices = [common([kinds.get(rules.pools[shape.pool].kind) for shape in stage.makeup.each()]) for stage in division.stages]
    return ClockSearch(ClusterSteps(division, rules), choices)
