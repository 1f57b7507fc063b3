"""Tests of a step's seconds with a fixed order of its actions, for many speeds at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.plan.message_delay import message_delay
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


@settings(max_examples=30, deadline=None)
@given(pipelines(), st.sampled_from([0.0, 0.004, 0.02]))
def test_delayed_messages_are_slower_links(made, delay_s):
    workload, stages, routes, timing, split = made
    schedule = simulate(workload, stages, routes, timing, split=split)[0]
    links = timing.links
    slower = timing
    if len(stages) > 1:
        before = ((0.0,) * (len(stages) - 1),) * 2 if links is None else (links.activations_s, links.gradients_s)
        slower = timing.linked(*([each + delay_s for each in seconds] for seconds in before))
    stretches = [[1.0] * len(stages), [1.3] * len(stages)]
    order = StepOrder(schedule, timing)
    assert order.delayed(delay_s).steps_s(stretches) == pytest.approx(StepOrder(schedule, slower).steps_s(stretches))
    assert order.longest(stretches[1]).fixed_s <= order.delayed(delay_s).longest(stretches[1]).fixed_s + 1e-9


@pytest.mark.parametrize("delay_s", [0.0, 0.0007, 0.002])
def test_the_delay_of_messages_is_learned_from_a_longer_step(delay_s):
    layers = tuple(LayerCost(forward_s=each, backward_s=2 * each, parameters=64, activation_bytes=0) for each in (0.01, 0.01, 0.0125))
    workload = Workload(layers=layers, micro_batches=16, grains=16)
    stages = [Stage(layers=range(at, at + 1), members=(at,)) for at in range(3)]
    schedule, _ = simulate(workload, stages, [(at,) * 16 for at in range(3)])
    order, stretches = StepOrder(schedule, Timing.of(workload, stages)), [1.22, 1.22, 1.0]
    usual_s, took_s = order.delayed(delay_s).steps_s([[1.0] * 3, stretches])
    found = message_delay(order, stretches, took_s / usual_s, most_s=0.01)
    usual_s, again_s = order.delayed(found).steps_s([[1.0] * 3, stretches])
    assert again_s / usual_s == pytest.approx(took_s / order.delayed(delay_s).steps_s([[1.0] * 3])[0], rel=1e-4)
    assert found == pytest.approx(delay_s, abs=2e-4)
    assert 0.0 < message_delay(order, stretches, 5.0, most_s=0.01) <= 0.01  # nothing explains so much
