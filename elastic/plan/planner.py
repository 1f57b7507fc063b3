"""The planner of a running job: chooses the plan with the least predicted time, including the change of plan.

Candidates are the best plans of `elastic.plan.search`, and the previous plan with its layers left in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from elastic.errors import PlanError
from elastic.plan.assignment import assign
from elastic.plan.choice import HORIZON, least
from elastic.plan.fleet import Fleet
from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import readable, shortfall
from elastic.plan.moving import Moving, moving
from elastic.plan.plan import Plan, Stage
from elastic.plan.prediction import predict
from elastic.plan.prepared import Prepared
from elastic.plan.routing import near_routes
from elastic.plan.saved import SavedPlan
from elastic.plan.search import Candidate, Question, asked, asking, searching
from elastic.plan.slicing import finish
from elastic.plan.splitting import saved_s, split_if_faster
from elastic.plan.workload import Workload

__all__ = ["HORIZON", "Plan", "PlannedChange", "Stage", "fastest", "given", "plan", "staying", "step_s"]

INTERRUPTED = 1.5
"""Share of a step that must be gained if a loss interrupts it and layers do not stay in place: half of it was computed on average, the
first step with other layers is slower, and what survivors hold of the step is lost. A kill and the return of a replacement cost 0.66 s
together with 0.5, 0.6 s with 1.0, and 0.52 to 0.59 s if layers always stay (docs/benchmarks.md).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedChange:
    """A plan, and the estimated cost of the change to it."""

    plan: Plan
    moving: Moving


Answers = Prepared[Question, tuple[Candidate, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _JobOption:
    candidate: Candidate
    moving: Moving
    lost_s: float

    def over_s(self, horizon: float) -> float:
        return self.candidate.predicted.step_s * horizon + self.lost_s


def plan(
    fleet: Fleet,
    workload: Workload,
    previous: Plan | None = None,
    horizon: float = HORIZON,
    *,
    stages: int | None = None,
    brief: bool = False,
    prepared: Answers | None = None,
) -> PlannedChange:
    """Returns the plan that takes least time over `horizon` steps, the migration from `previous` included.

    Candidates are the best plans, with workers exchanged so that least moves, and the previous plan with each stage's layers in place.
    `stages` is the number that the job asks for; it gets fewer if there are fewer workers. `brief` means that a loss interrupted a step
    and the lost workers will be replaced: then only workers that stay in place keep their work on the step, and the layers later move
    back. Answers in `prepared` are not searched for again; they change nothing else. Raises PlanError if no plan is possible.
    """
    costs = JobCosts(workload, fleet)
    if previous is None:
        best = _best(_searched(asking(fleet, workload, stages), fleet, prepared))
        return PlannedChange(plan=_settled(best, costs, stages), moving=Moving(bytes=0.0, seconds=0.0))
    stayed = _stayed(previous, costs, stages)
    try:
        candidates = _searched(asking(fleet, workload, stages), fleet, prepared)
    except PlanError:
        if stayed is None:
            raise
        candidates = ()
    fastest_first = sorted(candidates, key=lambda each: each.predicted.apart_s)
    tries = ((each.predicted.step_s, partial(_options, previous, each, costs, brief=brief)) for each in fastest_first)
    chosen = least(tries, horizon, stayed)
    assert chosen is not None  # there is a candidate, or the layers may stay
    bare = _settled(chosen.candidate, costs, stages)
    return PlannedChange(plan=replace(bare, why=f"{bare.why}; {_compared(chosen, stayed, horizon)}"), moving=chosen.moving)


def fastest(fleet: Fleet, workload: Workload, stages: int | None = None) -> Plan:
    """Returns the plan with the fastest step, in `stages` stages or in the fastest number of stages; ties go to fewer stages.

    Raises PlanError, with advice, if there are more stages than layers or workers, or if no plan fits into memory.
    """
    return _settled(_best(_searched(asking(fleet, workload, None)._replace(stages=stages), fleet, None)), JobCosts(workload, fleet))


def given(saved: SavedPlan, fleet: Fleet, workload: Workload) -> Plan:
    """Returns the saved plan for these workers, with predictions for them.

    Raises PlanError if it is for other members, another model or another batch, listing the differences, or does not fit into memory.
    """
    if differs := saved.differences([fleet.host(worker) for worker in fleet.workers], workload):
        raise PlanError(f"the saved plan is for another job: {'; '.join(differs)}. Make one for this job with `elastic plan`")
    found = saved.for_workers(fleet.workers)
    if lacking := shortfall(workload, found.stages, found.routes, fleet)[1]:
        raise PlanError(f"the saved plan does not fit into memory: {lacking}. Make one for this machine with `elastic plan`")
    costs = JobCosts(workload, fleet)
    predicted = predict(costs, found.stages, found.routes)
    return _settled(Candidate(stages=found.stages, routes=found.routes, predicted=predicted, reason="as saved"), costs)


def step_s(plan: Plan, workload: Workload, fleet: Fleet) -> float:
    """Returns the predicted seconds of a step of `plan` with these workers."""
    costs = JobCosts(workload, fleet)
    return predict(costs, plan.stages, plan.routes).step_s - saved_s(plan, costs)


def staying(previous: Plan, fleet: Fleet, workload: Workload) -> Plan | None:
    """Returns `previous` for these workers, with the layers of each stage in place; None if a stage would have no worker.

    Each worker that is not in `previous` goes to the stage with most work per worker, and first to a stage that has no worker left.
    Grains keep their worker as far as shares proportional to the workers' speeds allow.
    """
    costs = JobCosts(workload, fleet)
    found = _staying(previous, costs)
    return None if found is None else _settled(found, costs)


def _staying(previous: Plan, costs: JobCosts) -> Candidate | None:
    fleet, workload = costs.fleet, costs.workload
    present, known = set(fleet.workers), set(previous.workers)
    members = [[worker for worker in stage.members if worker in present] for stage in previous.stages]
    seconds = [
        sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in stage.layers) for stage in previous.stages
    ]
    for worker in fleet.workers:
        if worker not in known:
            power = [sum(1 / fleet.slowdown(other) for other in group) for group in members]
            most = max(range(len(members)), key=lambda number: seconds[number] / power[number] if power[number] else float("inf"))
            members[most].append(worker)
    if not all(members):
        return None
    stages = tuple(Stage(layers=stage.layers, members=tuple(group)) for stage, group in zip(previous.stages, members, strict=True))
    routes = tuple(near_routes(route, stage.members, fleet.slowdowns) for stage, route in zip(stages, previous.routes, strict=True))
    predicted = predict(costs, stages, routes)
    return Candidate(stages=stages, routes=routes, predicted=predicted, reason="every stage keeps its layers")


def _stayed(previous: Plan, costs: JobCosts, stages: int | None) -> _JobOption | None:
    """Returns the previous plan if it has the number of stages that the job asks for and fits into memory; else None."""
    found = _staying(previous, costs)
    if found is None or asked(costs.fleet, stages) not in (None, len(found.stages)):
        return None
    if shortfall(costs.workload, found.stages, found.routes, costs.fleet)[1]:
        return None
    return _option(previous, found, costs, brief=False)


def _searched(question: Question, fleet: Fleet, prepared: Answers | None) -> tuple[Candidate, ...]:
    found = None if prepared is None else prepared.answer(question)
    names = dict(enumerate(fleet.workers))
    return tuple(candidate.renamed(names) for candidate in found or finish(searching(question)))


def _best(candidates: Sequence[Candidate]) -> Candidate:
    """Compares steps without the crowding of hosts, which would hide the differences between plans."""
    return min(candidates, key=lambda each: each.predicted.apart_s)


def _options(previous: Plan, new: Candidate, costs: JobCosts, *, brief: bool) -> Iterator[_JobOption]:
    return (_option(previous, variant, costs, brief=brief) for variant in _relabelled(new, previous, costs))


def _relabelled(new: Candidate, old: Plan, costs: JobCosts) -> Iterator[Candidate]:
    """Yields the candidate, and, if workers are equal, the candidate with workers exchanged so that less moves."""
    fleet, workload = costs.fleet, costs.workload
    yield new
    if not fleet.equal or not fleet.memory_alike:
        return
    layers = enumerate(workload.layers)
    weights = [layer.parameter_bytes + layer.frozen_bytes + round(workload.state_bytes_of(number)) for number, layer in layers]
    near = assign(_plan(new, costs), old, weights)
    one_host = len({fleet.host(worker) for worker in fleet.workers}) == 1
    predicted = new.predicted if one_host else predict(costs, near.stages, near.routes)
    yield replace(new, stages=near.stages, routes=near.routes, predicted=predicted)


def _plan(candidate: Candidate, costs: JobCosts, wanted: int | None = None) -> Plan:
    """Makes the plan of a candidate; `wanted` is the number of stages that the job asks for."""
    return Plan(
        stages=candidate.stages,
        routes=candidate.routes,
        step_s=candidate.predicted.step_s,
        why=_why(candidate, costs.workload, costs.fleet, wanted),
        dealt=candidate.predicted.dealt,
    )


def _settled(candidate: Candidate, costs: JobCosts, wanted: int | None = None) -> Plan:
    """Makes the plan of a candidate that was chosen, and decides whether its backwards are split."""
    predicted = candidate.predicted
    return split_if_faster(_plan(candidate, costs, wanted), costs, crowded=predicted.crowded_s > predicted.compute_s)


def _why(candidate: Candidate, workload: Workload, fleet: Fleet, wanted: int | None) -> str:
    predicted, stages = candidate.predicted, candidate.stages
    slowest = predicted.bottleneck
    layers = stages[slowest].layers
    reason = candidate.reason
    if wanted is not None and len(stages) < wanted:
        few = "is only 1 worker" if len(fleet.workers) == 1 else f"are only {len(fleet.workers)} workers"
        reason = f"not the {wanted} that were asked for, since there {few}"
    why = (
        f"{_counted(len(stages), 'stage')}, {reason}: {max(predicted.compute_s, predicted.crowded_s):.3g} s computing and "
        f"{predicted.exchange_s:.3g} s exchanging gradients, predicted; stage {slowest} ({_named(layers)}) "
        f"computes longest, {predicted.stage_s[slowest]:.3g} s"
    )
    if predicted.crowded_s > predicted.compute_s:
        why += "; a host has more workers than it can compute for at the same time"
    if predicted.dealt:
        why += "; micro-batches are dealt out in turn, since stages have different numbers of workers"
    if idle := [worker for stage, route in zip(stages, candidate.routes, strict=True) for worker in stage.members if worker not in route]:
        who = f"worker {idle[0]} gets" if len(idle) == 1 else f"workers {idle} get"
        why += f"; {who} no grain: there {'is' if workload.grains == 1 else 'are'} only {workload.grains}"
    if slow := {worker: fleet.slowdown(worker) for worker in fleet.workers if fleet.slowdown(worker) != 1.0}:
        why += "; " + ", ".join(f"worker {worker} takes {factor:.2g} times as long" for worker, factor in sorted(slow.items()))
    link = fleet.link(fleet.workers, fleet.workers)
    if len(fleet.workers) > 1 and not link.measured:
        why += f"; links without a measurement are assumed to carry {readable(link.bytes_per_s)}/s"
    return why


def _option(previous: Plan, new: Candidate, costs: JobCosts, *, brief: bool) -> _JobOption:
    moved = moving(previous, new.stages, costs.workload, costs.fleet)
    lost_s = 2 * moved.seconds + INTERRUPTED * previous.step_s if brief else moved.seconds
    return _JobOption(candidate=new, moving=moved, lost_s=lost_s)


def _compared(chosen: _JobOption, stayed: _JobOption | None, horizon: float) -> str:
    """Describes what the choice moves, and how long a step would take if the layers stayed in place."""
    moved = f"about {readable(chosen.moving.bytes)} move in {chosen.moving.seconds:.2g} s"
    if stayed is None:
        return f"{moved}; the layers cannot stay in place"
    if stayed is chosen:
        return f"{moved}; no other plan is faster over {_counted(horizon, 'step')}"
    stay_s = stayed.candidate.predicted.step_s
    return f"{moved}; with all layers in place a step would take {stay_s:.3g} s, compared over {_counted(horizon, 'step')}"


def _counted(number: float, noun: str) -> str:
    return f"{number:.4g} {noun}{'' if number == 1 else 's'}"


def _named(layers: range) -> str:
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start} to {layers.stop - 1}"
