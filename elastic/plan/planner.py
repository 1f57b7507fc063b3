"""The planner: from workers and a workload to the plan with the least predicted time, a change of plan included.

The partition with the least bottleneck is what a stage's workers could do if they never waited. They do wait where neighbouring stages have
different numbers of workers: micro-batches go in ascending order, so a narrow stage feeds the workers of a wide one after each other. So
stages of equal time and width are tried as well, and the simulated schedule decides.

Where workers differ in speed, each stage takes neighbours in the order of their speeds, the slowest or the fastest first. Where a plan does
not fit into memory, layers are divided anew within these limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from elastic.errors import PlanError
from elastic.plan.assignment import assign
from elastic.plan.fleet import Fleet
from elastic.plan.memory import readable, refuse, shortfall
from elastic.plan.moving import Moving, moving
from elastic.plan.partition import check_feasible, partition
from elastic.plan.plan import Plan, Stage
from elastic.plan.prediction import Prediction, predict
from elastic.plan.routing import near_routes, weighted_routes
from elastic.plan.uneven import divide, divide_within
from elastic.plan.workload import Workload

__all__ = ["HORIZON", "Plan", "Planned", "Stage", "fastest", "plan", "staying", "step_s"]

HORIZON = 1000
"""Steps over which a migration has to pay, unless asked for otherwise."""

INTERRUPTED = 0.5
"""Of a step: what is thrown away on average where a loss interrupts it and layers do not stay in place."""

Parts = tuple[tuple[range, int], ...]
"""The layers and the number of workers of each stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan; the predicted seconds of a step and of the migration to it; the bytes that this moves; and why it is this plan."""

    plan: Plan
    step_s: float
    migration_s: float
    bytes: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    plan: Plan
    moving: Moving
    lost_s: float

    def over_s(self, horizon: float) -> float:
        return self.plan.step_s * horizon + self.lost_s


def plan(
    fleet: Fleet,
    workload: Workload,
    previous: Plan | None = None,
    horizon: float = HORIZON,
    *,
    stages: int | None = None,
    brief: bool = False,
) -> Planned:
    """The plan that takes least over `horizon` steps, the migration from `previous` included.

    Candidates are the best plans, whose workers are exchanged so that least moves, and the plan of before, each stage of which keeps its
    layers. `stages` is what the job asks for, and fewer where there are fewer workers. With `brief` a step has been interrupted, of which
    only those who stay keep what is done, and the layers go back when the lost are replaced. Raises PlanError if nothing is possible.
    """
    asked = None if stages is None else min(stages, len(fleet.workers))
    stay = None if previous is None else staying(previous, fleet, workload)
    if stay is not None and asked not in (None, len(stay.stages)):
        stay = None
    if stay is not None and shortfall(workload, stay.stages, stay.routes, fleet)[1]:
        stay = None
    try:
        candidates = _feasible(fleet, workload, asked)
    except PlanError:
        if stay is None:
            raise
        candidates = []
    if previous is None:
        best = min(candidates, key=lambda each: each[0])[1]
        return Planned(plan=best, step_s=best.step_s, migration_s=0.0, bytes=0.0, why=best.why)
    weights = [layer.parameter_bytes + round(workload.state_bytes_of(number)) for number, layer in enumerate(workload.layers)]
    chosen = stayed = None if stay is None else _option(previous, stay, workload, fleet, brief=False)
    for _, candidate in sorted(candidates, key=lambda each: each[0]):
        if chosen is not None and candidate.step_s * horizon >= chosen.over_s(horizon):
            continue
        candidate = _relabelled(candidate, previous, weights, workload, fleet)
        option = _option(previous, candidate, workload, fleet, brief=brief)
        if chosen is None or option.over_s(horizon) < chosen.over_s(horizon):
            chosen = option
    assert chosen is not None  # there is a candidate, or one may stay
    why = f"{chosen.plan.why}; {_compared(chosen, stayed, horizon)}"
    return Planned(
        plan=replace(chosen.plan, why=why),
        step_s=chosen.plan.step_s,
        migration_s=chosen.moving.seconds,
        bytes=chosen.moving.bytes,
        why=why,
    )


def fastest(fleet: Fleet, workload: Workload, stages: int | None = None) -> Plan:
    """The plan with the fastest step, in `stages` stages or in the number that is fastest; ties go to fewer.

    Raises PlanError, saying what to do, if the stages are more than the layers or the workers, or nothing fits into memory.
    """
    return min(_feasible(fleet, workload, stages), key=lambda each: each[0])[1]


def step_s(plan: Plan, workload: Workload, fleet: Fleet) -> float:
    """The predicted seconds of a step of `plan` with these workers."""
    return predict(plan.stages, plan.routes, workload, fleet).step_s


def staying(previous: Plan, fleet: Fleet, workload: Workload) -> Plan | None:
    """`previous` with these workers, where each stage keeps its layers. None if a stage would have nobody.

    Workers that `previous` does not know go one after the other where most is computed by worker, first of all where nobody is left.
    Grains stay where they are as far as shares that suit the workers' speeds allow.
    """
    members = [[worker for worker in stage.members if worker in fleet.workers] for stage in previous.stages]
    seconds = [
        sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in stage.layers) for stage in previous.stages
    ]
    for worker in fleet.workers:
        if worker not in previous.workers:
            power = [sum(1 / fleet.slowdown(other) for other in group) for group in members]
            most = max(range(len(members)), key=lambda number: seconds[number] / power[number] if power[number] else float("inf"))
            members[most].append(worker)
    if not all(members):
        return None
    stages = [Stage(layers=stage.layers, members=tuple(group)) for stage, group in zip(previous.stages, members, strict=True)]
    routes = [near_routes(route, stage.members, fleet.slowdowns) for stage, route in zip(stages, previous.routes, strict=True)]
    return _judged(stages, routes, workload, "every stage keeps its layers", fleet)[1]


def _feasible(fleet: Fleet, workload: Workload, stages: int | None) -> list[tuple[float, Plan]]:
    """Candidates that fit into memory, with the seconds by which they are compared: fewer stages come first."""
    workers = len(fleet.workers)
    most = min(len(workload.layers), workers)
    if stages is None:
        counts, reason = range(1, most + 1), f"fastest of 1 to {most}"
    else:
        check_feasible(len(workload.layers), workers, stages)
        counts, reason = [stages], "as asked"
    found: list[tuple[float, Plan]] = []
    short: list[tuple[float, str]] = []
    for count in counts:
        lacking: list[tuple[float, str]] = []
        for divisions in (_divisions, _within_memory):
            if divisions is _divisions or lacking:
                for order, parts in divisions(fleet, workload, count):
                    filled, routes = _filled(order, parts, workload)
                    lack = shortfall(workload, filled, routes, fleet)
                    if lack[1]:
                        lacking.append(lack)
                    else:
                        found.append(_judged(filled, routes, workload, reason, fleet))
        short += lacking
    if not found:
        raise refuse(f"{stages} stages" if stages is not None else f"1 to {most} stages", min(short)[1])
    return found


def _orders(fleet: Fleet) -> list[Fleet]:
    """Workers in the orders in which they may fill the stages."""
    if fleet.equal:
        return [fleet]
    return [fleet.ordered(sorted(fleet.workers, key=lambda worker: sign * fleet.slowdown(worker))) for sign in (1, -1)]


def _divisions(fleet: Fleet, workload: Workload, count: int) -> Iterator[tuple[Fleet, Parts]]:
    """Workers in order, and the layers and the number of workers of each stage."""
    for order in _orders(fleet):
        parts = _partitions(workload, len(order.workers), count) if fleet.equal else [divide(workload, order, count)]
        yield from ((order, each) for each in parts)


def _within_memory(fleet: Fleet, workload: Workload, count: int) -> Iterator[tuple[Fleet, Parts]]:
    """The same, within the memory that workers have."""
    for order in _orders(fleet):
        parts = divide_within(workload, order, count)
        if parts is not None:
            yield order, parts


def _partitions(workload: Workload, workers: int, count: int) -> list[Parts]:
    """The partition with the least bottleneck, and the one into stages of equal time with equal numbers of workers."""
    balanced = [layers for layers, _ in partition(workload, count, count)]
    seconds = [sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in layers) for layers in balanced]
    longest_first = sorted(range(count), key=lambda stage: -seconds[stage])
    widths = {stage: workers // count + (place < workers % count) for place, stage in enumerate(longest_first)}
    equal = tuple((layers, widths[stage]) for stage, layers in enumerate(balanced))
    return list(dict.fromkeys([partition(workload, workers, count), equal]))


def _filled(fleet: Fleet, parts: Parts, workload: Workload) -> tuple[list[Stage], list[tuple[int, ...]]]:
    """Stages with their workers, and routes."""
    rest = iter(fleet.workers)
    stages = [Stage(layers=layers, members=tuple(next(rest) for _ in range(share))) for layers, share in parts]
    return stages, [weighted_routes(workload.grains, stage.members, fleet.slowdowns) for stage in stages]


def _judged(
    stages: Sequence[Stage], routes: Sequence[tuple[int, ...]], workload: Workload, reason: str, fleet: Fleet
) -> tuple[float, Plan]:
    """A plan, and the seconds by which it is compared with others: hosts with too many workers do not tell plans apart."""
    predicted = predict(stages, routes, workload, fleet)
    why = _why(stages, routes, workload, reason, fleet, predicted)
    return predicted.apart_s, Plan(stages=tuple(stages), routes=tuple(routes), step_s=predicted.step_s, why=why)


def _why(
    stages: Sequence[Stage], routes: Sequence[tuple[int, ...]], workload: Workload, reason: str, fleet: Fleet, predicted: Prediction
) -> str:
    slowest = predicted.bottleneck
    layers = stages[slowest].layers
    why = (
        f"{len(stages)} stages, {reason}: {max(predicted.compute_s, predicted.crowded_s):.3g} s computing and {predicted.exchange_s:.3g} s "
        f"exchanging gradients, predicted; stage {slowest} (layers {layers.start} to {layers.stop - 1}) computes longest, "
        f"{predicted.stage_s[slowest]:.3g} s"
    )
    if predicted.crowded_s > predicted.compute_s:
        why += "; a host has more workers than it can compute for at the same time"
    if idle := [worker for stage, route in zip(stages, routes, strict=True) for worker in stage.members if worker not in route]:
        why += f"; workers {idle} get no grain, of which there are only {workload.grains}"
    if slow := {worker: fleet.slowdown(worker) for worker in fleet.workers if fleet.slowdown(worker) != 1.0}:
        why += "; " + ", ".join(f"worker {worker} takes {factor:.2g} times as long" for worker, factor in sorted(slow.items()))
    link = fleet.link(fleet.workers, fleet.workers)
    if len(fleet.workers) > 1 and not link.measured:
        why += f"; links that nobody has measured are taken for {readable(link.bytes_per_s)}/s"
    return why


def _relabelled(new: Plan, old: Plan, weights: Sequence[int], workload: Workload, fleet: Fleet) -> Plan:
    """With workers that have changed places so that least moves, where that makes no difference else."""
    if not fleet.equal or len(set(fleet.memory.values())) > 1:
        return new
    near = assign(new, old, weights)
    if len({fleet.host(worker) for worker in fleet.workers}) == 1:
        return near
    again = predict(near.stages, near.routes, workload, fleet)
    return replace(near, step_s=again.step_s) if again.step_s <= new.step_s else new


def _option(previous: Plan, new: Plan, workload: Workload, fleet: Fleet, *, brief: bool) -> _Option:
    moved = moving(previous, new, workload, fleet)
    lost_s = 2 * moved.seconds + INTERRUPTED * previous.step_s if brief else moved.seconds
    return _Option(plan=new, moving=moved, lost_s=lost_s)


def _compared(chosen: _Option, stayed: _Option | None, horizon: float) -> str:
    """What the choice moves, and what it would take to leave the layers where they are."""
    moved = f"about {readable(chosen.moving.bytes)} move in {chosen.moving.seconds:.2g} s"
    if stayed is None:
        return f"{moved}; the layers cannot stay where they were"
    if stayed is chosen:
        return f"{moved}; no other is faster over {horizon:.3g} steps"
    return f"{moved}; with all layers where they were a step takes {stayed.plan.step_s:.3g} s, over {horizon:.3g} steps"
