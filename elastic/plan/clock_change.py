"""Weighs a change of clocks against moving layers, after a change of members. Pure.

In the mode "speed" the planner plans for GPUs that run at their highest sustainable clocks: so layers, routes and clocks are chosen
together, and layers move only if that pays although the clocks rise. In the mode "energy" layers and routes are chosen for the usual
clocks, and then clocks fall where stages wait; before, schedules become eager where memory allows, which leaves stages time to wait in
(`elastic.plan.eager`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from elastic.errors import PlanError
from elastic.plan.choice import HORIZON
from elastic.plan.clock_search import choose
from elastic.plan.clocks import ClockChoices, Clocked, ClockPlan, JobSteps, Mode, common, stretched
from elastic.plan.eager import as_eager_as_fits
from elastic.plan.fleet import Fleet
from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import readable
from elastic.plan.message_delay import message_delay
from elastic.plan.plan import Plan, Stage
from elastic.plan.planner import Answers, PlannedChange, plan, staying, step_s
from elastic.plan.workload import Workload

MOST_DELAY = 0.25
"""The longest delay of messages that a choice counts with, as a share of the time that the busiest GPU takes for a micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clocking:
    """The mode, and the clocks of each worker's GPU as far as they are known. `message_s`: see `message_delay.py`."""

    mode: Mode
    choices: Mapping[int, ClockChoices]
    message_s: float = 0.0

    def of(self, stage: Stage) -> ClockChoices | None:
        """Returns the clocks of a stage; None if those of any member are not known."""
        return common([self.choices.get(worker) for worker in stage.members])

    def raised(self, fleet: Fleet) -> Fleet:
        """Returns the fleet with all known GPUs at their highest sustainable clocks."""
        return stretched(fleet, {worker: choices.fastest.stretch for worker, choices in self.choices.items()})


def clocks_for(plan: Plan, fleet: Fleet, workload: Workload, clocking: Clocking) -> ClockPlan:
    """Returns the clocks for the stages of a plan."""
    steps = JobSteps(workload, fleet, plan).delayed(clocking.message_s)
    return choose(clocking.mode, steps, [clocking.of(stage) for stage in plan.stages])


def delay_shown(plan: Plan, fleet: Fleet, workload: Workload, clocking: Clocking, chosen: Clocked, longer: float) -> float:
    """Returns the delay of messages in seconds that explains why clocks made the step longer, as a share, than the models say."""
    stretches = [
        1.0 if clock is None or choices is None else choices.at(clock).stretch
        for clock, choices in zip(chosen.clocks, map(clocking.of, plan.stages), strict=True)
    ]
    steps = JobSteps(workload, fleet, plan)
    most_s = MOST_DELAY * max(stage.busiest_s for stage in steps.work) / workload.micro_batches
    return message_delay(steps, stretches, 1 + longer, most_s)


def with_clocks(plan: Plan, clocks: ClockPlan) -> Plan:
    """Returns the plan with these clocks, their prediction and reason."""
    step_s = plan.step_s + clocks.chosen.step_s - clocks.usual.step_s if clocks.changes else plan.step_s
    return replace(plan, clocks=clocks.chosen.clocks if clocks.changes else (), step_s=step_s, why=f"{plan.why}; {clocks.why}")


def clocked(
    fleet: Fleet,
    workload: Workload,
    previous: Plan | None,
    clocking: Clocking,
    horizon: float = HORIZON,
    *,
    stages: int | None = None,
    brief: bool = False,
    prepared: Answers | None = None,
) -> PlannedChange:
    """Returns the change of `planner.plan`, with clocks. Its reason says what was weighed. Raises PlanError if no plan is possible."""
    asked = {"stages": stages, "brief": brief, "prepared": prepared}
    usual = plan(fleet, workload, previous, horizon, **asked)
    if clocking.mode == "energy":
        usual = replace(usual, plan=as_eager_as_fits(usual.plan, JobCosts(workload, fleet)))
    if not clocking.choices:
        return usual
    if clocking.mode == "energy":
        return replace(usual, plan=with_clocks(usual.plan, clocks_for(usual.plan, fleet, workload, clocking)))
    raised = plan(clocking.raised(fleet), workload, previous, horizon, **asked)
    at_usual = replace(raised.plan, step_s=step_s(raised.plan, workload, fleet))
    clocks = clocks_for(at_usual, fleet, workload, clocking)
    if not clocks.changes:
        return replace(usual, plan=with_clocks(usual.plan, clocks))
    found = with_clocks(at_usual, clocks)
    compared = _compared(previous, usual, replace(raised, plan=found), fleet, workload, clocking)
    return replace(raised, plan=replace(found, why=f"{found.why}; {compared}" if compared else found.why))


def _compared(
    previous: Plan | None, usual: PlannedChange, raised: PlannedChange, fleet: Fleet, workload: Workload, clocking: Clocking
) -> str:
    """Returns what each way costs: clocks alone, layers alone, and both."""
    stayed = None if previous is None else staying(previous, fleet, workload)
    if stayed is None:
        return ""
    try:
        alone = clocks_for(stayed, fleet, workload, clocking).chosen.step_s
    except PlanError:
        return ""
    moves = _layers(raised.plan) != _layers(stayed)
    chose = "layers move and clocks rise" if moves else "clocks rise and all layers stay"
    return (
        f"{chose}: with clocks alone a step would take {alone:.3g} s; with layers alone {usual.plan.step_s:.3g} s, and about "
        f"{readable(usual.moving.bytes)} would move"
    )


def _layers(plan: Plan) -> Sequence[tuple[range, int]]:
    return [(stage.layers, len(stage.members)) for stage in plan.stages]
