"""Tests eager schedules: one micro-batch more in flight where memory allows, so that messages and irregular seconds delay nobody."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import coarse, cost, few, fleet, planned, step_seconds
from schedule_checks import validate
from schedule_strategies import column
from test_clocks import gpu

from elastic.plan import schedule
from elastic.plan.clock_change import Clocking, clocked
from elastic.plan.clocks import ClockChoices, Mode
from elastic.plan.dealing import bounds
from elastic.plan.eager import as_eager_as_fits
from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import needs_in
from elastic.plan.plan import Plan
from elastic.plan.planner import plan
from elastic.plan.simulation import simulate
from elastic.plan.step_order import StepOrder
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

FOUR = Workload(layers=(replace(cost(1, 2, parameters=1000), activation_bytes=500, output_bytes=100),) * 8, micro_batches=32, grains=32)


def four() -> Plan:
    return plan(fleet(range(4)), FOUR, stages=4).plan


@few
@given(planned(seconds=coarse), st.booleans(), st.integers(1, 4))
def test_eager_schedules_are_valid_and_take_the_simulated_time(case, dealt, eager):
    workload, stages, routes = case
    lists, seconds = simulate(workload, stages, routes, dealt=dealt, eager=eager)
    validate(lists, workload, routes, dealt=dealt, eager=eager)
    assert schedule.build(workload, stages, routes, dealt=dealt, eager=eager) == lists
    assert seconds == step_seconds(lists, workload, stages)


def test_stages_run_more_forwards_before_their_first_backward():
    workload, stages, routes = column([(1, 2)] * 3, 6)
    for eager, first in ((0, (3, 2, 1)), (1, (4, 3, 1)), (2, (5, 3, 1)), (9, (5, 3, 1))):
        lists = schedule.build(workload, stages, routes, eager=eager)
        assert tuple([action.kind for action in actions].index("B") for actions in lists.values()) == first
        assert bounds(routes, dealt=False, eager=eager) == first
    assert "".join(action.kind for action in lists[1]) == "FFFBFBFBFBBB"


def ordered(slow: int, eager: int) -> StepOrder:
    """Steps of four stages, of which all but one need 98 % of that one's time, as with lowered clocks."""
    workload, stages, routes = column([(1, 2) if stage == slow else (0.98, 1.96) for stage in range(4)], 64)
    return StepOrder(schedule.build(workload, stages, routes, eager=eager), Timing.of(workload, stages))


@pytest.mark.parametrize("slow", [0, 1, 2, 3])
def test_messages_delay_a_nearly_balanced_pipeline_only_while_it_fills_and_empties(slow):
    longer = []
    for eager in (0, 3):
        calm_s, delayed_s = (order.steps_s([[1.0] * 4])[0] for order in (ordered(slow, eager), ordered(slow, eager).delayed(0.05)))
        longer.append(delayed_s - calm_s)
    assert longer[0] > 1
    assert longer[1] == pytest.approx(6 * 0.05)  # the first one up, and the last one down again


@pytest.mark.parametrize("slow", [0, 1, 2, 3])
def test_irregular_seconds_delay_it_less(slow):
    """Every fortieth action takes half a forward longer."""

    def irregular(eager: int, seed: int) -> float:
        order, chance = ordered(slow, eager), random.Random(seed)
        late = {(stage, number) for stage in range(4) for number in range(128) if chance.random() < 1 / 40}
        counts = Counter[int]()
        for place, run in enumerate(order._runs):
            order._runs[place] = run._replace(seconds=run.seconds + 0.5 * ((run.stage, counts[run.stage]) in late))
            counts[run.stage] += 1
        return order.steps_s([[1.0] * 4])[0]

    usual, eager = ([irregular(eager, seed) for seed in range(20)] for eager in (0, 3))
    assert all(one < other for one, other in zip(eager, usual, strict=True))
    assert statistics.median(eager) - ordered(slow, 3).steps_s([[1.0] * 4])[0] < 3


def test_as_many_more_are_held_as_fit_into_memory():
    usual, all_four = four(), fleet(range(4))
    found = as_eager_as_fits(usual, JobCosts(FOUR, all_four))
    assert found.eager == 3
    assert "up to 3 micro-batches more in advance" in found.why
    assert found.step_s == pytest.approx(usual.step_s, rel=1e-4)
    assert Plan.from_json(found.to_json()) == found
    needed = [needs_in(FOUR, usual.stages, usual.routes, all_four, eager=eager) for eager in range(4)]
    more = [[round(each[worker].total - needed[0][worker].total) for worker in usual.workers] for each in needed]
    assert more == [[0, 0, 0, 0], [1000, 1100, 1100, 0], [2000, 2200, 1100, 0], [3000, 2200, 1100, 0]]
    first = usual.workers[0]
    for eager in range(4):
        limited = fleet(range(4), memory={first: round(needed[eager][first].total)})
        assert as_eager_as_fits(usual, JobCosts(FOUR, limited)).eager == eager


def test_one_stage_has_nothing_to_be_early_for():
    alone = plan(fleet(range(3)), FOUR, stages=1).plan
    assert as_eager_as_fits(alone, JobCosts(FOUR, fleet(range(3)))) == alone


def test_plans_are_eager_in_the_mode_energy_with_and_without_known_clocks():
    work, all_four = FOUR, fleet(range(4))
    cases: tuple[tuple[Mode, dict[int, ClockChoices], int], ...] = (
        ("energy", {}, 3),
        ("energy", dict.fromkeys(range(4), gpu()), 3),
        ("speed", {}, 0),
    )
    for mode, choices, eager in cases:
        found = clocked(all_four, work, None, Clocking(mode=mode, choices=choices), stages=4).plan
        assert found.eager == eager
        assert not found.clocks or choices
