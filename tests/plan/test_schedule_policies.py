"""Every policy: valid for random plans; zero-bubble reaches its closed forms; orders that feed unequal widths are faster."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_strategies import few, planned
from schedule_strategies import cases, column, orders

from elastic.errors import PlanError
from elastic.plan import schedule
from elastic.plan.arrivals import AsTheyArrive, InOrder
from elastic.plan.policy import ONE_F_ONE_B, Policy, busy_bounds, classic_bounds, ranking
from elastic.plan.schedule import Action
from elastic.plan.simulation import simulate
from elastic.plan.timing import Timing
from elastic.plan.zero_bubble import fastest, zb_h1, zero_bubble

eighth = st.integers(1, 8).map(lambda count: count / 8)


@few
@given(cases())
def test_every_policy_makes_valid_schedules(case):
    workload, stages, routes, policy, timing = case
    lists = schedule.build(workload, stages, routes, policy=policy, timing=timing)
    schedule.validate(lists, workload, routes, policy)
    assert schedule.parse(schedule.format(lists)) == lists
    kinds = {action.kind for cells in lists.values() for action in cells}
    assert kinds == ({"F", "I", "W"} if policy.split else {"F", "B"})
    for cells in lists.values():
        forwards = [action.micro_batch for action in cells if action.kind == "F"]
        for kind in kinds:
            assert [action.micro_batch for action in cells if action.kind == kind] == forwards


@few
@given(cases())
def test_forwards_ascend_within_a_grain(case):
    workload, stages, routes, policy, timing = case
    for cells in schedule.build(workload, stages, routes, policy=policy, timing=timing).values():
        for grain in range(workload.grains):
            mine = [a.micro_batch for a in cells if a.kind == "F" and workload.grain_of(a.micro_batch) == grain]
            assert mine == sorted(mine)


@few
@given(planned(), orders)
def test_rankings_have_every_micro_batch_once_and_ascend_within_a_grain(case, order):
    workload, _, routes = case
    homes = [[route[workload.grain_of(m)] for m in range(workload.micro_batches)] for route in routes]
    ranked = ranking(order, homes)
    assert sorted(ranked) == list(range(workload.micro_batches))
    for grain in range(workload.grains):
        mine = [m for m in ranked if m in workload.micro_batches_of(grain)]
        assert mine == list(workload.micro_batches_of(grain))


def test_micro_batches_are_dealt_by_share():
    assert ranking("dealt", [[0] * 6, [1, 1, 2, 2, 3, 3]]) == [0, 2, 4, 1, 3, 5]
    assert ranking("dealt", [[1, 1, 1, 1, 2, 2]]) == [0, 4, 1, 2, 5, 3]


@few
@given(eighth, eighth, eighth, st.integers(1, 6), st.integers(1, 12))
def test_zero_bubble_reaches_its_closed_form(f, i, w, depth, micro_batches):
    case = column([(f, i + w)] * depth, micro_batches)
    timing = Timing.of(*case[:2], weights_share=w / (i + w))
    seconds = simulate(*case, policy=zero_bubble(), timing=timing)[1]
    assert seconds == pytest.approx(micro_batches * (f + i + w) + (depth - 1) * (f + i))
    assert seconds <= simulate(*case)[1] + 1e-9


@few
@given(eighth, eighth, eighth, st.integers(1, 6), st.integers(0, 8))
def test_zb_h1_reaches_its_closed_form(f, i, w, depth, more):
    assume(w <= min(f, i))
    micro_batches = depth + more
    case = column([(f, i + w)] * depth, micro_batches)
    timing = Timing.of(*case[:2], weights_share=w / (i + w))
    policy = replace(zb_h1(classic_bounds(depth)), patience=0.99)
    lists, seconds = simulate(*case, policy=policy, timing=timing)
    assert seconds == pytest.approx(micro_batches * (f + i + w) + (depth - 1) * (f + i - w))
    schedule.validate(lists, case[0], case[2], policy)
    if depth > 1:
        with pytest.raises(PlanError, match="activations of more than"):
            schedule.validate(lists, case[0], case[2])


def test_zb_h1_is_the_schedule_of_the_paper():
    case = column([(1, 2)] * 4, 8)
    lists = schedule.build(*case, policy=zb_h1(classic_bounds(4)))
    assert schedule.format(lists).splitlines()[0] == (
        "0: 0F0 0F1 0F2 0F3 0I0 0W0 0F4 0I1 0W1 0F5 0I2 0W2 0F6 0I3 0W3 0F7 0I4 0W4 0I5 0W5 0I6 0W6 0I7 0W7"
    )


def test_a_forward_does_not_wait_for_room_while_there_is_time_to_make_some():
    case = column([(1, 4), (1, 4)], 3)
    assert simulate(*case, policy=zb_h1(classic_bounds(2)))[1] == 18


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_arrivals_are_taken_by_rank_or_as_they_come(times, data):
    """As they come: of what is there the lowest rank; if nothing is, the earliest."""
    by_rank, as_come = InOrder(range(len(times))), AsTheyArrive()
    for rank in data.draw(st.permutations(range(len(times)))):
        by_rank.put(rank, times[rank])
        as_come.put(rank, times[rank])
    left, free = set(range(len(times))), 0.0
    for expected in range(len(times)):
        assert by_rank.ready_s(free) == max(times[expected], free)
        assert by_rank.pop(free) == expected
        start = as_come.ready_s(free)
        assert start == max(free, min(times[rank] for rank in left))
        taken = as_come.pop(free)
        assert taken == min(rank for rank in left if times[rank] <= start)
        left.remove(taken)
        free = start + data.draw(st.integers(0, 2))
    assert by_rank.ready_s(free) == as_come.ready_s(free) == math.inf


UNEQUAL = {
    "1-4": ([(0.25, 0.5), (1, 2)], [1, 4]),
    "4-1": ([(1, 2), (0.25, 0.5)], [4, 1]),
    "2-3": ([(2, 4), (3, 6)], [2, 3]),
    "1-4-2": ([(1, 2), (4, 8), (2, 4)], [1, 4, 2]),
    "3-1-3": ([(3, 6), (1, 2), (3, 6)], [3, 1, 3]),
    "1-2-4-8": ([(1, 2), (2, 4), (4, 8), (8, 16)], [1, 2, 4, 8]),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_unequal_widths_are_fed_faster_in_other_orders(name):
    seconds, widths = UNEQUAL[name]
    case = column(seconds, 24, widths)
    ascending = simulate(*case)[1]
    for order in ("dealt", "arriving"):
        here = Policy(order=order, first="forward")
        assert simulate(*case, policy=here)[1] < 0.9 * ascending
        assert (
            simulate(*case, policy=Policy(order=order, first="forward", in_flight=busy_bounds(widths)))[1]
            <= simulate(*case, policy=here)[1]
        )


@few
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), orders)
def test_equal_stages_have_one_schedule_in_every_order(depth, width, each, order):
    case = column([(1, 2)] * depth, width * each, [width] * depth)
    assert schedule.build(*case, policy=Policy(order=order)) == schedule.build(*case)
    assert schedule.build(*case, policy=Policy(first="forward")) == schedule.build(*case)
    assert busy_bounds([width] * depth) == classic_bounds(depth)


def test_other_orders_keep_more_folds_open():
    case = column([(1, 2), (4, 8)], 16, [1, 4], grains=8)
    ascending = schedule.build(*case)[0]
    dealt = schedule.build(*case, policy=Policy(order="dealt"))[0]
    assert schedule.open_folds(ascending, case[0]) == 1
    assert schedule.open_folds(dealt, case[0]) == 4
    assert schedule.open_folds((), case[0]) == 0


@few
@given(cases())
def test_the_fastest_is_no_slower_than_any(case):
    workload, stages, routes, policy, timing = case
    tried = [ONE_F_ONE_B, policy, zero_bubble("arriving"), zero_bubble()]
    chosen, seconds = fastest(workload, stages, routes, tried, timing)
    times = [simulate(workload, stages, routes, policy=each, timing=timing)[1] for each in tried]
    assert seconds == min(times)
    assert chosen == tried[times.index(seconds)]


def test_bounds_follow_the_widths():
    assert classic_bounds(3) == (3, 2, 1)
    assert busy_bounds([1, 4, 2]) == (7, 2, 1)
    assert Policy(in_flight=(3, 2), held=(2, 4)).bounds(2) == ((2, 2), (2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "any"}, "one of the orders"),
        ({"first": "weights"}, "first is"),
        ({"in_flight": (2, 0)}, "in_flight must be at least one"),
        ({"held": (0,)}, "held must be at least one"),
        ({"patience": float("nan")}, "patience"),
        ({"patience": -1.0}, "patience"),
    ],
)
def test_bad_policies_are_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        Policy(**arguments)


def test_policies_for_other_depths_and_no_policies_are_refused():
    case = column([(1, 1)] * 2, 2)
    with pytest.raises(PlanError, match="bounds 3 and 3 stages, and the plan has 2"):
        schedule.build(*case, policy=Policy(in_flight=(3, 2, 1)))
    with pytest.raises(PlanError, match="no policies"):
        fastest(*case, [])


SPLIT = "0: 0F0 0F1 0I0 0W0 0I1 0W1\n1: 1F0 1I0 1W0 1F1 1I1 1W1"
DAMAGE = {
    "weights lost": ("0I1 0W1", "0I1", "0W1 is missing from worker 0"),
    "inputs lost": ("0I1 0W1", "0W1", "0I1 is missing from worker 0"),
    "both forms": ("0I1 0W1", "0I1 0W1 0B1", "beside the other form(?s:.*)>0B1<"),
    "weights first": ("1I0 1W0", "1W0 1I0", "deadlock(?s:.*)>1W0< 1I0"),
    "weights out of order": ("0W0 0I1 0W1", "0I1 0W1 0W0", "backwards of grain 0 are not in ascending order(?s:.*)0W1 >0W0<"),
    "too many held": ("1W0 1F1 1I1 1W1", "1F1 1I1 1W0 1W1", "activations of more than 1 micro-batches held at stage 1(?s:.*)>1F1<"),
    "twice": ("1I1 1W1", "1I1 1I1 1W1", "1I1 is there twice"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_split_schedules_are_refused_and_marked(name):
    old, new, message = DAMAGE[name]
    assert old in SPLIT
    case = column([(1, 2)] * 2, 2, grains=1)
    schedule.validate(schedule.parse(SPLIT), case[0], case[2])
    with pytest.raises(PlanError, match=message):
        schedule.validate(schedule.parse(SPLIT.replace(old, new)), case[0], case[2])


@few
@given(cases(), st.data())
def test_any_action_lost_from_any_schedule_is_refused(case, data):
    workload, stages, routes, policy, timing = case
    lists = schedule.build(workload, stages, routes, policy=policy, timing=timing)
    worker = data.draw(st.sampled_from([worker for worker, cells in lists.items() if cells]))
    cells = list(lists[worker])
    del cells[data.draw(st.integers(0, len(cells) - 1))]
    with pytest.raises(PlanError, match=r"missing|in flight|held"):
        schedule.validate({**lists, worker: tuple(cells)}, workload, routes, policy)


def test_split_actions_print_as_torch_does():
    assert schedule.parse("0: 2I0 2W0") == {0: (Action(2, "I", 0), Action(2, "W", 0))}
    assert schedule.format({0: (Action(2, "I", 0), Action(2, "W", 0))}) == "0: 2I0 2W0"
