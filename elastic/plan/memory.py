"""What a worker must hold, in bytes, to be a member of a stage: what `docs/design.md` says is kept, added up.

All but activations is spread evenly over the members, as layouts do; activations are those of the micro-batches that 1F1B has in flight,
S - s of them at stage s of S. Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (2021), has that bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    spare: float
    replicas: float
    gradients: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.states + self.spare + self.replicas + self.gradients + self.activations

    def __str__(self) -> str:
        parts = ("parameters", "states", "spare", "replicas", "gradients", "activations")
        return ", ".join(f"{readable(getattr(self, part))} {part}" for part in parts if getattr(self, part))


def need(workload: Workload, layers: range, members: int, workers: int, ahead: int, grains: int) -> Need:
    """Of one member of a stage with `members` of all `workers`, and `ahead` = S - s stages from it to the end; it computes `grains`."""
    costs = [workload.layers[layer] for layer in layers]
    parameters = sum(cost.parameter_bytes for cost in costs)
    states = sum(workload.state_bytes_of(layer) for layer in layers)
    share = 1 / members
    in_flight = min(ahead, grains * (workload.micro_batches // workload.grains))
    entering = workload.layers[layers.start - 1].output_bytes if layers.start else 0
    return Need(
        parameters=parameters,
        states=states * share,
        spare=(parameters + states) * share,
        replicas=replica_bytes(workload, workers),
        gradients=parameters * subtrees(grains) + parameters * share * max(1, members - 1),
        activations=in_flight * (sum(cost.activation_bytes for cost in costs) + entering),
    )


def replica_bytes(workload: Workload, workers: int) -> float:
    """What each of `workers` keeps for others: a share of all parameters and states, and of the gradients that bring these up to date."""
    if workers < 2:
        return 0.0
    parameters = sum(cost.parameter_bytes for cost in workload.layers)
    states = sum(map(workload.state_bytes_of, range(len(workload.layers))))
    return (2 * parameters + states) / workers


def subtrees(grains: int) -> int:
    """The most subtree sums that wait at once where so many consecutive grains are folded, one by one."""
    return max((i.bit_count() + 1 for i in range(grains)), default=0)


def shortfall(workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]], fleet: Fleet) -> tuple[float, str]:
    """How many bytes the worker lacks that lacks most, and a sentence about it; nothing and an empty one where all fit."""
    worst, said = 0.0, ""
    for number, (stage, route) in enumerate(zip(stages, routes, strict=True)):
        for worker in stage.members:
            if worker not in fleet.memory:
                continue
            needed = need(workload, stage.layers, len(stage.members), len(fleet.workers), len(stages) - number, route.count(worker))
            lacking = needed.total - fleet.memory[worker]
            if lacking > worst:
                worst = lacking
                said = (
                    f"stage {number} (layers {stage.layers.start} to {stage.layers.stop - 1}) needs {readable(needed.total)} on worker "
                    f"{worker}, which is {round(lacking)} bytes more than the {readable(fleet.memory[worker])} it has for it ({needed})"
                )
    return worst, said


def refuse(count: str, said: str) -> PlanError:
    """What to raise where nothing fits."""
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
