"""Random policies and timings, and what a step takes by an independent recursion."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from hypothesis import strategies as st
from plan_strategies import cost, eighths, planned

from elastic.plan.actions import Action, Schedule
from elastic.plan.plan import Stage
from elastic.plan.policy import Policy
from elastic.plan.routing import even_routes
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

orders = st.sampled_from(["ascending", "dealt", "arriving"])
shares = st.sampled_from([0.0, 0.25, 0.5, 1.0])
factors = st.sampled_from([0.5, 1.0, 2.0])


def column(seconds, micro_batches: int, widths=None, grains: int | None = None):
    """A stage a layer, of these forward and backward seconds; one worker a stage unless `widths` says else."""
    grains = grains or micro_batches
    workload = Workload(layers=tuple(cost(f, b, 1) for f, b in seconds), micro_batches=micro_batches, grains=grains)
    stages, first = [], 0
    for number, width in enumerate(widths or [1] * len(seconds)):
        stages.append(Stage(layers=range(number, number + 1), members=tuple(range(first, first + width))))
        first += width
    return workload, stages, [even_routes(grains, stage.members) for stage in stages]


@st.composite
def policies(draw, depth: int) -> Policy:
    bounds = st.none() | st.lists(st.integers(1, 6), min_size=depth, max_size=depth).map(tuple)
    return Policy(
        order=draw(orders),
        first=draw(st.sampled_from(["backward", "forward"])),
        in_flight=draw(bounds),
        split=draw(st.booleans()),
        held=draw(bounds),
        patience=draw(st.sampled_from([0.0, 0.5, 2.0])),
    )


@st.composite
def timings(draw, workload, stages) -> Timing:
    """Everything in binary fractions, so that sums are exact in any order."""
    timing = Timing.of(workload, stages, draw(shares))
    workers, boundaries = list(timing.stage), len(stages) - 1
    times = st.lists(eighths, min_size=boundaries, max_size=boundaries)
    timing = timing.slowed(
        draw(st.dictionaries(st.sampled_from(workers), factors)), draw(st.dictionaries(st.integers(0, len(stages) - 1), factors))
    )
    timing = timing.updating(draw(st.dictionaries(st.sampled_from(workers), eighths)))
    if draw(st.booleans()):
        timing = timing.linked(draw(times), draw(times))
    sync = draw(st.lists(eighths, min_size=len(stages), max_size=len(stages)))
    return replace(timing, sync_s=tuple(sync), barrier=draw(st.booleans()))


@st.composite
def cases(draw):
    """A workload, stages, routes, a policy and a timing."""
    workload, stages, routes = draw(planned())
    return workload, stages, routes, draw(policies(len(stages))), draw(timings(workload, stages))


def seconds_of(action: Action, worker: int, timing: Timing) -> float:
    pace = timing.paces[worker]
    return {"F": pace.forward_s, "B": pace.backward_s, "I": pace.backward_s - pace.weights_s, "W": pace.weights_s}[action.kind]


def latest_end(schedule: Schedule, timing: Timing) -> float:
    """When the last action ends: the longest chain, over workers, messages, and messages that share a link."""
    last = len(timing.members) - 1
    at = {action: (worker, place) for worker, actions in schedule.items() for place, action in enumerate(actions)}
    messages: dict[tuple[int, int], list[Action]] = {}
    for worker, actions in schedule.items():
        for action in actions:
            stage, kind, m = action
            to = Action(stage + 1, "F", m) if kind == "F" else gradient(at, stage - 1, m)
            if kind != "W" and to in at:
                messages.setdefault((worker, at[to][0]), []).append(action)

    @cache
    def end(action: Action) -> float:
        worker, place = at[action]
        before = end(schedule[worker][place - 1]) if place else 0.0
        return max(before, needed(action)) + seconds_of(action, worker, timing)

    def needed(action: Action) -> float:
        stage, kind, m = action
        if kind == "F":
            return arrival(Action(stage - 1, "F", m), at[action][0]) if stage else 0.0
        if kind == "W":
            return end(Action(stage, "I", m))
        return end(Action(stage, "F", m)) if stage == last else arrival(gradient(at, stage + 1, m), at[action][0])

    @cache
    def arrival(sent: Action, receiver: int) -> float:
        pair = at[sent][0], receiver
        queue = messages[pair]
        place = queue.index(sent)
        free = arrival(queue[place - 1], receiver) if place else 0.0
        return max(free, end(sent)) + timing.link_s(*pair)

    return max(end(action) for action in at)


def gradient(at, stage: int, micro_batch: int) -> Action:
    """The action that gives the gradients of the stage's inputs."""
    return next((a for kind in "BI" if (a := Action(stage, kind, micro_batch)) in at), Action(stage, "B", micro_batch))
