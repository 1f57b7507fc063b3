"""Tests of a step's seconds with a fixed order of its actions, for many speeds at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.plan.plan import Stage
from elastic.plan.simulation import judge, simulate
from elastic.plan.step_order import StepOrder
from elastic.plan.timing import Timing
from elastic.plan.workload import LayerCost, Workload


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Workload, list[Stage], list[tuple[int, ...]], Timing, bool]:
    """Pipelines of up to four stages with one or two members each, links, synchronisation, and split backwards or not."""
    seconds = draw(st.lists(st.sampled_from([0.02, 0.03, 0.05]), min_size=1, max_size=4))
    count, split = draw(st.integers(1, 6)), draw(st.booleans())
    layers = tuple(
        LayerCost(forward_s=each, backward_s=2 * each, weight_s=each * split, parameters=64, activation_bytes=0)
        for each in seconds
        for each in seconds
    )
    workload = Workload(layers=layers, micro_batches=count, grains=count)
    workers = iter(range(100))
    sizes = draw(st.lists(st.integers(1, 2), min_size=len(seconds), max_size=len(seconds)))
    stages = [Stage(layers=range(at, at + 1), members=tuple(next(workers) for _ in range(size))) for at, size in enumerate(sizes)]
    routes = [tuple(stage.members[grain % len(stage.members)] for grain in range(count)) for stage in stages]
    timing = Timing.of(workload, stages)
    if len(stages) > 1:
        link_s = draw(st.sampled_from([0.0, 0.01, 0.1]))
        timing = timing.linked([link_s] * (len(stages) - 1), [2 * link_s] * (len(stages) - 1))
    return workload, stages, routes, timing, split


@settings(max_examples=60, deadline=None)
@given(pipelines())
def test_at_the_speeds_of_the_schedule_it_is_the_simulated_step(made):
    workload, stages, routes, timing, split = made
    schedule, step_s = simulate(workload, stages, routes, timing, split=split)
    assert StepOrder(schedule, timing).steps_s([[1.0] * len(stages)] * 2) == pytest.approx([step_s] * 2)
    assert step_s == pytest.approx(judge(workload, stages, routes, timing, split=split).end_s)


@settings(max_examples=60, deadline=None)
@given(pipelines(), st.data())
def test_a_step_is_as_long_as_its_longest_path_and_never_shorter_if_a_stage_is_slower(made, data):
    workload, stages, routes, timing, split = made
    order = StepOrder(simulate(workload, stages, routes, timing, split=split)[0], timing, 0.5)
    stretch = st.lists(st.sampled_from([0.8, 1.0, 1.3, 2.0]), min_size=len(stages), max_size=len(stages))
    one, other = data.draw(stretch), data.draw(stretch)
    path, slower = order.longest(one), [max(pair) for pair in zip(one, other, strict=True)]
    ones_s, others_s, slower_s = order.steps_s([one, other, slower])

    def along(stretches: list[float]) -> float:
        return path.fixed_s + sum(busy_s * each for busy_s, each in zip(path.busy_s, stretches, strict=True))

    assert along(one) == pytest.approx(ones_s)
    assert along(other) <= others_s + 1e-9
    assert slower_s >= max(ones_s, others_s) - 1e-9
