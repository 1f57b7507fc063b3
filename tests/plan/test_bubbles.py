"""Tests idle time by cause: the parts add up, and equal the known bubbles of 1F1B."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few, positive_eighths
from schedule_strategies import cases, column, updating

from elastic.plan.bubbles import Bubbles, breakdown, bubble_share, gaps
from elastic.plan.simulation import judge
from elastic.plan.timeline import StepTimeline
from elastic.plan.timing import Timing


@few
@given(cases())
def test_busy_and_idle_add_up_to_the_step(case):
    workload, stages, routes, timing = case
    timeline = judge(workload, stages, routes, timing=timing)
    found = breakdown(timeline)
    assert list(found) == [worker for stage in stages for worker in stage.members]
    for worker, bubbles in found.items():
        assert bubbles.idle_s == timeline.end_s - sum(span.end_s - span.start_s for span in timeline.spans[worker])
        assert bubbles.idle_s == sum(gap.end_s - gap.start_s for gap in gaps(timeline, worker))
        spans = sorted([*timeline.spans[worker], *gaps(timeline, worker)], key=lambda each: (each[0], each[1]))
        assert [each[0] for each in spans] == [0.0, *(each[1] for each in spans[:-1])][: len(spans)]
    if timeline.end_s:
        assert 0 <= bubble_share(timeline) < 1


@few
@given(st.integers(1, 6), st.integers(0, 8), positive_eighths, positive_eighths)
def test_equal_stages_are_idle_as_in_the_literature(depth, more, forward_s, backward_s):
    """(S - 1)(f + b) at every stage: filling takes s f, draining s b, and between these the stage waits for the later stages."""
    timeline = judge(*column([(forward_s, backward_s)] * depth, depth + more))
    for stage, bubbles in breakdown(timeline).items():
        behind = depth - 1 - stage
        assert bubbles == Bubbles(fill_s=stage * forward_s, wait_s=behind * (forward_s + backward_s), drain_s=stage * backward_s)
    assert bubble_share(timeline) == pytest.approx((depth - 1) / (2 * depth - 1 + more))


def test_members_wait_for_each_other_to_synchronise():
    case = column([(1, 2)], 3, [2])
    timing = updating(replace(Timing.of(*case[:2]), sync_s=(1.0,)), {0: 0.5})
    assert breakdown(judge(*case, timing=timing)) == {0: Bubbles(), 1: Bubbles(sync_s=3.0, drain_s=0.5)}
    assert breakdown(judge(*case, timing=replace(timing, sync_s=(0.0,)))) == {0: Bubbles(), 1: Bubbles(drain_s=3.5)}


def test_a_worker_without_a_grain_is_idle_all_the_time():
    timeline = judge(*column([(1, 2)], 1, [2]))
    assert breakdown(timeline)[1] == Bubbles(drain_s=3)
    assert bubble_share(timeline) == 0.5


def test_a_step_of_no_time_has_no_bubbles():
    assert bubble_share(StepTimeline(members=((0,),), spans={0: ()})) == 0.0
