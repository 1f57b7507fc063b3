"""Bytes that a worker must hold to be a member of a stage: the sum of what `docs/design.md` says is kept.

All but activations is spread evenly over the members, as layouts do; activations are those of the micro-batches that 1F1B has in flight,
S - s of them at stage s of S. Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (2021), has that bound.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from elastic.errors import PlanError
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Stage
from elastic.plan.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes: parameters of the stage's layers; optimizer states, and the spare, of what the worker owns; replicas with their updates;
    gradient sums, its own and received; activations in flight and what crosses the boundary for them."""

    parameters: float
    states: float
    previous_copy: float
    replicas: float
    gradients: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.states + self.previous_copy + self.replicas + self.gradients + self.activations

    def __str__(self) -> str:
        parts = ("parameters", "states", "previous_copy", "replicas", "gradients", "activations")
        return ", ".join(f"{readable(getattr(self, part))} {part.replace('_', ' ')}" for part in parts if getattr(self, part))


def need(workload: Workload, layers: range, members: int, workers: int, ahead: int, grains: int) -> Need:
    """Of one member of a stage with `members` of all `workers`, and `ahead` = S - s stages from it to the end; it computes `grains`.

    It keeps its part of the replicas of all: the least that can be said without the other stages.
    """
    costs = [workload.layers[layer] for layer in layers]
    parameters = sum(cost.parameter_bytes for cost in costs)
    states = sum(workload.state_bytes_of(layer) for layer in layers)
    share = 1 / members
    in_flight = min(ahead, grains * (workload.micro_batches // workload.grains))
    entering = workload.layers[layers.start - 1].output_bytes if layers.start else 0
    return Need(
        parameters=parameters,
        states=states * share,
        previous_copy=(parameters + states) * share,
        replicas=copied_bytes(workload, range(len(workload.layers))) / workers if workers > 1 else 0.0,
        gradients=parameters * subtrees(grains) + parameters * share * max(1, members - 1),
        activations=in_flight * (sum(cost.activation_bytes for cost in costs) + entering),
    )


def needs(workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> dict[int, Need]:
    """The need of every worker of a plan. A copy needs as much as its owner owns, which is most where the owner is alone in its stage."""
    workers = sum(len(stage.members) for stage in stages)
    owned = [(copied_bytes(workload, stage.layers) / len(stage.members), number) for number, stage in enumerate(stages)]
    found: dict[int, Need] = {}
    for number, (stage, route) in enumerate(zip(stages, routes, strict=True)):
        largest = max((size for size, other in owned if other != number or len(stage.members) > 1), default=0.0)
        grains, alike = Counter(route), dict[int, Need]()
        for worker in stage.members:
            count = grains[worker]
            if count not in alike:
                mean = need(workload, stage.layers, len(stage.members), workers, len(stages) - number, count)
                alike[count] = replace(mean, replicas=max(mean.replicas, largest))
            found[worker] = alike[count]
    return found


def copied_bytes(workload: Workload, layers: range) -> float:
    """A replica of whole layers: parameters and states, and the gradients that bring these up to date."""
    return sum(2 * workload.layers[layer].parameter_bytes + workload.state_bytes_of(layer) for layer in layers)


def subtrees(grains: int) -> int:
    """The most subtree sums that wait at once where so many consecutive grains are folded, one by one."""
    return max((i.bit_count() + 1 for i in range(grains)), default=0)


def shortfall(workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]], fleet: Fleet) -> tuple[float, str]:
    """The bytes that the worker with the greatest lack lacks, and a sentence about it; 0 and an empty one where all fit."""
    worst, said = 0.0, ""
    for worker, needed in needs(workload, stages, routes).items() if fleet.memory else ():
        lacking = needed.total - fleet.memory.get(worker, math.inf)
        if lacking > worst:
            number = next(number for number, stage in enumerate(stages) if worker in stage.members)
            layers, worst = stages[number].layers, lacking
            said = (
                f"stage {number} (layers {layers.start} to {layers.stop - 1}) needs {readable(needed.total)} on worker {worker}, which is "
                f"{round(lacking)} bytes more than the {readable(fleet.memory[worker])} it has beside what its process takes ({needed})"
            )
    return worst, said


def refuse(count: str, said: str) -> PlanError:
    """The error to raise where nothing fits."""
    return PlanError(
        f"the model does not fit into memory in {count}: at best {said}; give workers more memory=, take more workers or stages, smaller "
        "micro-batches, or checkpoint_activations=True"
    )


def readable(size: float) -> str:
    """In decimal units, such as `1.5 GB`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g} {units[0]}"
