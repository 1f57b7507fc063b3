"""Decides whether a plan's backwards are split in two parts, of which the second fills waiting times."""

from __future__ import annotations

from dataclasses import replace

from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import shortfall
from elastic.plan.plan import Plan
from elastic.plan.simulation import simulate
from elastic.plan.timing import Timing

WORTH = 0.99
"""The largest share of its time that a step may still take if its backwards are split."""


def split_if_faster(plan: Plan, costs: JobCosts, *, crowded: bool) -> Plan:
    """Returns the plan, with its backwards split if that is predicted to be faster and one more micro-batch fits into memory.

    On `crowded` hosts, which compute for more workers than they have processors for, nobody gains from the waiting times of others.
    """
    workload, fleet = costs.workload, costs.fleet
    if crowded or not any(workload.layers[layer].weight_s for stage in plan.stages[1:] for layer in stage.layers):
        return plan
    whole_s, split_s = _seconds(plan, costs)
    if split_s > WORTH * whole_s or shortfall(workload, plan.stages, plan.routes, fleet, split=True, dealt=plan.dealt)[1]:
        return plan
    why = f"{plan.why}; backwards in two parts, the second in waiting times, take {whole_s - split_s:.2g} s off a step"
    return replace(plan, split=True, step_s=plan.step_s - (whole_s - split_s), why=why)


def saved_s(plan: Plan, costs: JobCosts) -> float:
    """Returns the seconds that the plan's split backwards take off a step by the simulation; 0 if they are not split."""
    if not plan.split:
        return 0.0
    whole_s, split_s = _seconds(plan, costs)
    return whole_s - split_s


def _seconds(plan: Plan, costs: JobCosts) -> tuple[float, float]:
    """Returns the simulated seconds of all micro-batches, with backwards whole and split."""
    timing = Timing.of(costs.workload, plan.stages).slowed(costs.fleet.slowdowns)
    whole_s, split_s = (
        simulate(costs.workload, plan.stages, plan.routes, timing, split=split, dealt=plan.dealt)[1] for split in (False, True)
    )
    return whole_s, split_s
