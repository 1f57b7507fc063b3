"""The planner: from workers and a workload to the plan with the least predicted step time.

The partition with the least bottleneck is what a stage's workers could do if they never waited. They do wait where neighbouring stages have
different numbers of workers: micro-batches go in ascending order, so a narrow stage feeds the workers of a wide one after each other. So
stages of equal time and width are tried as well, and the simulated schedule decides.

Where workers differ in speed, each stage takes neighbours in the order of their speeds, the slowest or the fastest first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from elastic.errors import PlanError
from elastic.plan.partition import check_feasible, partition
from elastic.plan.plan import Plan, Stage
from elastic.plan.routing import near_routes, weighted_routes
from elastic.plan.simulation import simulate
from elastic.plan.timing import Timing
from elastic.plan.uneven import divide
from elastic.plan.workload import Workload

__all__ = ["Plan", "Stage", "plan", "shrunk", "step_s"]

SYNC_BYTES_PER_S = 2e9
"""Assumed speed of gradient exchange, per worker and direction."""

PARAMETER_BYTES = 4

Parts = tuple[tuple[range, int], ...]
"""The layers and the number of workers of each stage."""


def plan(workers: Sequence[int], workload: Workload, stages: int | None = None, slowdowns: Mapping[int, float] | None = None) -> Plan:
    """Divides the layers among `workers` (ids; stages are filled in this order) in `stages` stages, or in the number that is fastest.

    A layer takes a worker `slowdowns[worker]` times as long as the workload says; 1 for those not named.
    Predicted is the simulated schedule plus, for the slowest stage, the time to exchange its gradients and parameters at
    `SYNC_BYTES_PER_S`. Ties go to fewer stages. Raises PlanError, saying what to do, if the stages are more than the layers or the workers.
    """
    if len(set(workers)) < len(workers) or not workers:
        raise PlanError(f"a plan needs at least one worker and each only once, not {list(workers)}")
    most = min(len(workload.layers), len(workers))
    if stages is None:
        counts, reason = range(1, most + 1), f"fastest of 1 to {most}"
    else:
        check_feasible(len(workload.layers), len(workers), stages)
        counts, reason = [stages], "as asked"
    factors = {worker: (slowdowns or {}).get(worker, 1.0) for worker in workers}
    if len(set(factors.values())) == 1:
        plans = [
            _planned(workers, workload, parts, reason, factors) for count in counts for parts in _partitions(workload, len(workers), count)
        ]
    else:
        orders = [sorted(workers, key=lambda worker: sign * factors[worker]) for sign in (1, -1)]
        plans = [
            _planned(order, workload, divide(workload, [factors[worker] for worker in order], count), reason, factors)
            for count in counts
            for order in orders
        ]
    return min(plans, key=lambda candidate: candidate.step_s)


def step_s(plan: Plan, workload: Workload, slowdowns: Mapping[int, float]) -> float:
    """The predicted seconds of a step of `plan` where its workers have these slowdowns."""
    return _judged(plan.stages, plan.routes, workload, "", slowdowns).step_s


def shrunk(previous: Plan, workers: Collection[int], workload: Workload, slowdowns: Mapping[int, float] | None = None) -> Plan | None:
    """`previous` without those who are not among `workers`; each stage keeps its layers. None if a stage would have nobody.

    Grains stay where they are as far as even shares allow.
    """
    stages = [
        Stage(layers=stage.layers, members=left) for stage in previous.stages if (left := tuple(w for w in stage.members if w in workers))
    ]
    if len(stages) < len(previous.stages):
        return None
    routes = [near_routes(route, stage.members, slowdowns) for stage, route in zip(stages, previous.routes, strict=True)]
    return _judged(stages, routes, workload, "every stage keeps its layers", slowdowns or {})


def _partitions(workload: Workload, workers: int, count: int) -> list[Parts]:
    """The partition with the least bottleneck, and the one into stages of equal time with equal numbers of workers."""
    balanced = [layers for layers, _ in partition(workload, count, count)]
    seconds = [sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in layers) for layers in balanced]
    longest_first = sorted(range(count), key=lambda stage: -seconds[stage])
    widths = {stage: workers // count + (place < workers % count) for place, stage in enumerate(longest_first)}
    equal = tuple((layers, widths[stage]) for stage, layers in enumerate(balanced))
    return list(dict.fromkeys([partition(workload, workers, count), equal]))


def _planned(workers: Sequence[int], workload: Workload, parts: Parts, reason: str, slowdowns: Mapping[int, float]) -> Plan:
    rest = iter(workers)
    stages = tuple(Stage(layers=layers, members=tuple(next(rest) for _ in range(share))) for layers, share in parts)
    routes = [weighted_routes(workload.grains, stage.members, slowdowns) for stage in stages]
    return _judged(stages, routes, workload, reason, slowdowns)


def _judged(
    stages: Sequence[Stage], routes: Sequence[tuple[int, ...]], workload: Workload, reason: str, slowdowns: Mapping[int, float]
) -> Plan:
    compute = simulate(workload, stages, routes, timing=Timing.of(workload, stages).slowed(slowdowns))[1]
    exchange = max(_exchange_s(workload, stage) for stage in stages)
    why = f"{len(stages)} stages, {reason}: {compute:.3g} s computing and {exchange:.3g} s exchanging gradients, predicted"
    if idle := [worker for stage, route in zip(stages, routes, strict=True) for worker in stage.members if worker not in route]:
        why += f"; workers {idle} get no grain, of which there are only {workload.grains}"
    if slow := {worker: slowdowns[worker] for stage in stages for worker in stage.members if slowdowns.get(worker, 1.0) != 1.0}:
        why += "; " + ", ".join(f"worker {worker} takes {factor:.2g} times as long" for worker, factor in sorted(slow.items()))
    return Plan(stages=tuple(stages), routes=tuple(routes), step_s=compute + exchange, why=why)


def _exchange_s(workload: Workload, stage: Stage) -> float:
    """Reduce-scatter and all-gather: each moves (n - 1) / n of the stage's parameters through every worker."""
    elements = sum(workload.layers[layer].parameters for layer in stage.layers)
    others = len(stage.members) - 1
    return 2 * elements * PARAMETER_BYTES * others / len(stage.members) / SYNC_BYTES_PER_S
