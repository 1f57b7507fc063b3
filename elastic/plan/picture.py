"""Makes a timeline, which can be drawn, of one step of a plan on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastic.plan.division.division import Division
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.plan import Stage
from elastic.plan.simulation import judge
from elastic.plan.timeline import StepTimeline
from elastic.plan.timing import MemberSeconds, Timing
from elastic.plan.workload import LayerCost, Workload

MOST_ROWS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStep:
    """What a simulation of a step needs. Its work takes no time in the workload: the paces of `timing` have it."""

    workload: Workload
    stages: tuple[Stage, ...]
    routes: list[tuple[int, ...]]
    timing: Timing

    def judged(self, factors: Mapping[int, float] | None = None) -> StepTimeline:
        """Returns the simulated step, with the work of each worker `factors[worker]` times as long."""
        return judge(self.workload, self.stages, self.routes, timing=self.timing.slowed(factors or {}))


def timeline(division: Division, rules: PhysicalRules) -> tuple[StepTimeline, int]:
    """Returns the simulated step, and how many replicas it shows: all if they are few, else the first, since all are equal."""
    shown = division.replicas if len(division.stages) * division.replicas <= MOST_ROWS else 1
    return timed(division, rules, shown).judged(), shown


def timed(division: Division, rules: PhysicalRules, shown: int) -> TimedStep:
    """Returns the step of the first `shown` replicas.

    Worker s D + j is replica j of stage s; each of the D pipelines takes its own micro-batches.
    """
    depth, profiles = len(division.stages), rules.profiles
    stages = tuple(
        Stage(layers=stage.layers, members=tuple(number * shown + replica for replica in range(shown)))
        for number, stage in enumerate(division.stages)
    )
    micro_batches = division.micro_batches * shown
    nothing = LayerCost(forward_s=0.0, backward_s=0.0, parameters=1, activation_bytes=0)
    workload = Workload(layers=(nothing,) * profiles.layers, micro_batches=micro_batches, grains=micro_batches)
    routes = [tuple(stage.members[m // division.micro_batches] for m in range(micro_batches)) for stage in stages]
    paces: dict[int, MemberSeconds] = {}
    for number, stage in enumerate(division.stages):
        for replica, shape in enumerate(stage.makeup.each()[:shown]):
            seconds = profiles.of(rules.pools[shape.pool].kind, division.micro_batch, shape.tp)[stage.layers.start : stage.layers.stop]
            update_s = float(rules.update_s(shape, division.micro_batch)[stage.layers.start, stage.layers.stop])
            paces[number * shown + replica] = MemberSeconds(
                forward_s=sum(each.forward_s for each in seconds), backward_s=sum(each.backward_s for each in seconds), update_s=update_s
            )
    timing = Timing(
        members=tuple(stage.members for stage in stages),
        paces=paces,
        sync_s=tuple(float(rules.sync_s(stage.makeup)[stage.layers.start, stage.layers.stop]) for stage in division.stages),
    )
    if depth > 1:
        timing = timing.linked(*_crossings(division, rules))
    return TimedStep(workload=workload, stages=stages, routes=routes, timing=timing)


def _crossings(division: Division, rules: PhysicalRules) -> tuple[list[float], list[float]]:
    """Returns seconds of activations and of gradients over each boundary, for the slowest pair of replicas."""
    onward: list[float] = []
    back: list[float] = []
    for stage, following in zip(division.stages, division.stages[1:], strict=False):
        pairs = set(zip(stage.makeup.each(), following.makeup.each(), strict=True))
        edge = following.layers.start
        onward.append(max(float(rules.forward_s(one, other, division.micro_batch)[edge]) for one, other in pairs))
        back.append(max(float(rules.backward_s(other, one, division.micro_batch)[edge]) for one, other in pairs))
    return onward, back
