"""Clocks for a plan of a cluster on paper: its steps, simulated, in the form that `clock_search` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastic.plan.clock_search import ClockSearch
from elastic.plan.clocks import ClockChoices, StageWork, common
from elastic.plan.division.division import Division
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.picture import timed


class ClusterSteps:
    """The steps of a division. All replicas are equal, so the first one is simulated."""

    def __init__(self, division: Division, rules: PhysicalRules) -> None:
        self._step = timed(division, rules, 1)
        self._known: dict[tuple[float, ...], float] = {}
        self.work = tuple(self._work(division, number) for number in range(len(division.stages)))

    def _work(self, division: Division, number: int) -> StageWork:
        pace = self._step.timing.paces[self._step.stages[number].members[0]]
        once_s = pace.forward_s + pace.backward_s
        busy_s = once_s * division.micro_batches + pace.update_s
        devices = sum(shape.tp for shape in division.stages[number].makeup.each())
        return StageWork(busiest_s=busy_s, total_s=busy_s * devices, once_s=once_s, devices=devices)

    def step_s(self, stretches: Sequence[float]) -> float:
        key = tuple(stretches)
        if key not in self._known:
            factors = {stage.members[0]: stretch for stage, stretch in zip(self._step.stages, stretches, strict=True)}
            self._known[key] = self._step.judged(factors).end_s
        return self._known[key]


def clocks_of(division: Division, rules: PhysicalRules, kinds: Mapping[str, ClockChoices]) -> ClockSearch:
    """Returns the search for the clocks of a division, with the clocks of each kind of device; stages of other kinds keep theirs."""
    choices = [common([kinds.get(rules.pools[shape.pool].kind) for shape in stage.makeup.each()]) for stage in division.stages]
    return ClockSearch(ClusterSteps(division, rules), choices)
