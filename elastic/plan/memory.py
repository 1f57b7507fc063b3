"""Bytes that a worker must hold as a member of a stage: the sum of the copies that `docs/design.md` lists.

Everything but activations is spread evenly over the members, as in layouts. Activations are those of the micro-batches that 1F1B has in
flight: S - s of them at stage s of S, and one more at stages other than the first if backwards are split. Source of this bound: Narayanan
et al., "Memory-Efficient Pipeline-Parallel DNN Training" (2021).
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
    """Bytes of one worker: the stage's parameters; optimizer states of what it owns, their copy from the step before, and an older one
    that is kept; replicas with their previous copies and updates; gradient sums, its own and received; activations in flight, with their
    inputs."""

    parameters: float
    states: float
    previous_copy: float
    kept_copy: float
    replicas: float
    gradients: float
    activations: float

    @property
    def total(self) -> float:
        copies = self.previous_copy + self.kept_copy + self.replicas
        return self.parameters + self.states + copies + self.gradients + self.activations

    def __str__(self) -> str:
        parts = ("parameters", "states", "previous_copy", "kept_copy", "replicas", "gradients", "activations")
        return ", ".join(f"{readable(getattr(self, part))} {part.replace('_', ' ')}" for part in parts if getattr(self, part))


def need(
    workload: Workload,
    layers: range,
    members: int,
    workers: int,
    ahead: int,
    grains: int,
    *,
    replicas: int = 1,
    outlive: bool = False,
    split: bool = False,
) -> Need:
    """Returns the need of one member of a stage with `members` of all `workers`, `ahead` = S - s stages from the end, computing `grains`.

    If state may `outlive` its process, sums of gradients are not written to in place, which takes one more of each vector.
    Its `replicas` of others' state are an even share of all replicas: a lower bound, which needs no other stages.
    """
    costs = [workload.layers[layer] for layer in layers]
    parameters = sum(cost.parameter_bytes for cost in costs)
    states = sum(workload.state_bytes_of(layer) for layer in layers)
    share = 1 / members
    in_flight = min(ahead + (split and layers.start > 0), grains * (workload.micro_batches // workload.grains))
    entering = workload.layers[layers.start - 1].output_bytes if layers.start else 0
    return Need(
        parameters=parameters,
        states=states * share,
        previous_copy=(parameters + states) * share,
        kept_copy=(parameters + states) * share if replicas and workers > 1 else 0.0,
        replicas=replicas * copied_bytes(workload, range(len(workload.layers))) / workers if workers > 1 else 0.0,
        gradients=parameters * (subtrees(grains) + (outlive and grains > 1)) + parameters * share * max(1, members - 1),
        activations=in_flight * (sum(cost.activation_bytes for cost in costs) + entering),
    )


def needs(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    *,
    replicas: int = 1,
    outlive: bool = False,
    split: bool = False,
) -> dict[int, Need]:
    """Returns the need of every worker of a plan. A replica is as large as its owner's part: most if the owner is alone in its stage."""
    workers = sum(len(stage.members) for stage in stages)
    owned = [(copied_bytes(workload, stage.layers) / len(stage.members), number) for number, stage in enumerate(stages)]
    found: dict[int, Need] = {}
    for number, (stage, route) in enumerate(zip(stages, routes, strict=True)):
        largest = max((size for size, other in owned if other != number or len(stage.members) > 1), default=0.0)
        grains, alike = Counter(route), dict[int, Need]()
        for worker in stage.members:
            count = grains[worker]
            if count not in alike:
                kept = {"replicas": replicas, "outlive": outlive, "split": split}
                mean = need(workload, stage.layers, len(stage.members), workers, len(stages) - number, count, **kept)
                alike[count] = replace(mean, replicas=max(mean.replicas, replicas * largest))
            found[worker] = alike[count]
    return found


def copied_bytes(workload: Workload, layers: range) -> float:
    """Returns the bytes of a replica of whole layers: parameters and states, those of the step before, and gradients to update them."""
    return sum(3 * workload.layers[layer].parameter_bytes + 2 * workload.state_bytes_of(layer) for layer in layers)


def subtrees(grains: int) -> int:
    """Returns the most subtree sums that wait at once when so many consecutive grains are folded one by one."""
    return max((i.bit_count() + 1 for i in range(grains)), default=0)


def shortfall(
    workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]], fleet: Fleet, *, split: bool = False
) -> tuple[float, str]:
    """Returns the bytes that the worker with the largest shortfall lacks, and a sentence about it; 0 and an empty sentence if all fit."""
    worst, problem = 0.0, ""
    for worker, needed in (
        needs(workload, stages, routes, replicas=fleet.replicas, outlive=fleet.outlive, split=split).items() if fleet.memory else ()
    ):
        lacking = needed.total - fleet.memory.get(worker, math.inf)
        if lacking > worst:
            number = next(number for number, stage in enumerate(stages) if worker in stage.members)
            layers, worst = stages[number].layers, lacking
            problem = (
                f"stage {number} (layers {layers.start} to {layers.stop - 1}) needs {readable(needed.total)} on worker {worker}, which is "
                f"{round(lacking)} bytes more than the {readable(fleet.memory[worker])} it has besides its process ({needed})"
            )
    return worst, problem


def refuse(count: str, said: str) -> PlanError:
    """Returns the error to raise if no plan fits."""
    return PlanError(
        f"the model does not fit into memory in {count}. In the closest plan, {said}. Give workers more memory=, use more workers or "
        "stages, smaller micro-batches, or checkpoint_activations=True"
    )


def readable(size: float) -> str:
    """Formats a size in decimal units, such as `1.5 GB`."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g} {units[0]}"
