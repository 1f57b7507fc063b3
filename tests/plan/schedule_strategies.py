"""Strategies for timings, and the duration of a step by an independent recursion."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from hypothesis import strategies as st
from plan_strategies import cost, eighths, planned

from elastic.plan.actions import Action, Schedule
from elastic.plan.plan import Stage
from elastic.plan.routing import even_routes
from elastic.plan.timeline import StepTimeline
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

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


def updating(timing: Timing, seconds: dict[int, float]) -> Timing:
    """With these seconds for the updates of these workers."""
    paces = {worker: replace(timing.paces[worker], update_s=update_s) for worker, update_s in seconds.items()}
    return replace(timing, paces={**timing.paces, **paces})


@st.composite
def timings(draw, workload, stages) -> Timing:
    """Everything in binary fractions, so that sums are exact in any order."""
    timing = Timing.of(workload, stages)
    workers, boundaries = list(timing.stage), len(stages) - 1
    times = st.lists(eighths, min_size=boundaries, max_size=boundaries)
    timing = timing.slowed(draw(st.dictionaries(st.sampled_from(workers), factors)))
    timing = updating(timing, draw(st.dictionaries(st.sampled_from(workers), eighths)))
    if draw(st.booleans()):
        timing = timing.linked(draw(times), draw(times))
    sync = draw(st.lists(eighths, min_size=len(stages), max_size=len(stages)))
    return replace(timing, sync_s=tuple(sync))


@st.composite
def cases(draw):
    """A workload, stages, routes, and a timing."""
    workload, stages, routes = draw(planned())
    return workload, stages, routes, draw(timings(workload, stages))


def compute_end_s(timeline: StepTimeline) -> float:
    """When the last forward or backward has ended."""
    return max((span.end_s for spans in timeline.spans.values() for span in spans if span.computes), default=0.0)


def actions_of(timeline: StepTimeline):
    """Each action and its worker."""
    for stage, group in enumerate(timeline.members):
        for worker in group:
            for span in timeline.spans[worker]:
                if span.computes:
                    yield Action(stage, span.activity, span.micro_batch), worker


def seconds_of(action: Action, worker: int, timing: Timing) -> float:
    pace = timing.paces[worker]
    return pace.forward_s if action.kind == "F" else pace.backward_s


def link_s(timing: Timing, sender: int, receiver: int) -> float:
    return 0.0 if timing.links is None else timing.links(sender, receiver)


def latest_end(schedule: Schedule, timing: Timing) -> float:
    """When the last action ends: the longest chain, over workers, messages, and messages that share a link."""
    last = len(timing.members) - 1
    at = {action: (worker, place) for worker, actions in schedule.items() for place, action in enumerate(actions)}
    messages: dict[tuple[int, int], list[Action]] = {}
    for worker, actions in schedule.items():
        for action in actions:
            stage, kind, m = action
            to = Action(stage + 1, "F", m) if kind == "F" else Action(stage - 1, "B", m)
            if to in at:
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
        return end(Action(stage, "F", m)) if stage == last else arrival(Action(stage + 1, "B", m), at[action][0])

    @cache
    def arrival(sent: Action, receiver: int) -> float:
        pair = at[sent][0], receiver
        queue = messages[pair]
        place = queue.index(sent)
        free = arrival(queue[place - 1], receiver) if place else 0.0
        return max(free, end(sent)) + link_s(timing, *pair)

    return max(end(action) for action in at)
