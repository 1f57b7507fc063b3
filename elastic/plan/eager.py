"""Decides how eager a schedule is: how many micro-batches more than in 1F1B its stages may hold, as far as memory allows. Pure.

In 1F1B a stage runs its next forward only after the backward for which the stage above has just sent the gradient. So between two actions
of the stage above a message goes down and another one up again. Where the stage below needs nearly as long as it does, it waits for them,
and for every irregularity of the stage below. With one forward more in advance it has an input meanwhile. As that is so between any two
stages, stage s of S holds up to S - 1 - s more than the S - s of 1F1B. Source: Zhuang et al., "On Optimizing the Communication of Model
Parallelism" (MLSys 2023), whose eager 1F1B holds 2 (S - s) - 1.

Clocks that are lowered until stages need nearly as long as the bottleneck rely on it: docs/dvfs.md has figures.
"""

from __future__ import annotations

from dataclasses import replace

from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import shortfall
from elastic.plan.plan import Plan
from elastic.plan.simulation import simulate


def as_eager_as_fits(plan: Plan, costs: JobCosts) -> Plan:
    """Returns the plan with the most eager schedule that fits into memory, unless it is predicted to take longer."""
    workload, fleet = costs.workload, costs.fleet
    if plan.split:
        return plan
    asked = workload, plan.stages, plan.routes
    fits = (eager for eager in range(len(plan.stages) - 1, 0, -1) if not shortfall(*asked, fleet, dealt=plan.dealt, eager=eager)[1])
    most = next(fits, 0)
    if not most:
        return plan
    timing = costs.timing(plan.stages)
    usual_s, eager_s = (simulate(*asked, timing, dealt=plan.dealt, eager=eager)[1] for eager in (0, most))
    if eager_s > usual_s * (1 + 1e-9):
        return plan
    count = "a micro-batch" if most == 1 else f"up to {most} micro-batches"
    why = f"{plan.why}; stages take {count} more in advance, so that messages and irregular seconds delay them less"
    return replace(plan, eager=most, step_s=plan.step_s - (usual_s - eager_s), why=why)
