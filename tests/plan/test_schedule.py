"""Tests schedules: 1F1B, free of deadlock, within memory, printed and parsed; a validator marks damaged cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plan_strategies import coarse, cost, few, planned, positive_eighths, splitting, step_seconds
from schedule_checks import validate

from elastic.errors import PlanError
from elastic.plan import schedule
from elastic.plan.plan import Stage
from elastic.plan.routing import even_routes
from elastic.plan.schedule import Action
from elastic.plan.simulation import simulate
from elastic.plan.workload import Workload

actions = st.builds(Action, st.integers(0, 20), st.sampled_from("FBIW"), st.integers(0, 200))
schedules = st.dictionaries(st.integers(0, 99), st.lists(actions, max_size=8).map(tuple), max_size=5)


@given(schedules)
def test_print_and_parse_round_trip(lists):
    assert schedule.parse(schedule.format(lists)) == lists
    assert schedule.format(schedule.parse(schedule.format(lists))) == schedule.format(lists)


def test_it_prints_as_torch_does():
    assert str(Action(2, "F", 0)) == "2F0"
    assert schedule.format({3: (Action(0, "F", 0), Action(0, "B", 0)), 4: ()}) == "3: 0F0 0B0\n4:"


@pytest.mark.parametrize("text", ["0F0", "x: 0F0", "0: 0F", "0: 0X0", "0: 0F0,0B0", "0: 0F0\n0: 0B0", "-1: 0F0"])
def test_what_is_not_a_schedule_is_refused(text):
    with pytest.raises(PlanError, match=r"schedule starts with|is written like"):
        schedule.parse(text)


@few
@given(planned())
def test_built_schedules_are_valid_and_take_the_simulated_time(case):
    workload, stages, routes = case
    lists, seconds = simulate(workload, stages, routes)
    validate(lists, workload, routes)
    assert schedule.build(workload, stages, routes) == lists
    assert seconds == step_seconds(lists, workload, stages)
    assert set(lists) == {worker for stage in stages for worker in stage.members}


@few
@given(planned(), st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_split_backwards_are_valid_and_take_the_simulated_time(case, shares):
    workload, stages, routes = case
    workload = splitting(workload, shares)
    lists, seconds = simulate(workload, stages, routes, split=True)
    validate(lists, workload, routes)
    assert schedule.build(workload, stages, routes, split=True) == lists
    assert seconds == step_seconds(lists, workload, stages)
    for actions in lists.values():
        for kind in "FIW":
            numbers = [action.micro_batch for action in actions if action.kind == kind]
            assert numbers == sorted(numbers)


def test_the_second_parts_of_backwards_fill_the_bubble():
    workload = Workload(layers=(cost(1, 2, input_s=1, weight_s=1),) * 2, micro_batches=4, grains=4)
    stages = [Stage(layers=range(1), members=(0,)), Stage(layers=range(1, 2), members=(1,))]
    routes = [even_routes(4, stage.members) for stage in stages]
    lists, seconds = simulate(workload, stages, routes, split=True)
    assert schedule.format(lists).splitlines() == [
        "0: 0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3",
        "1: 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3",
    ]
    assert (simulate(workload, stages, routes)[1], seconds) == (15, 13)


@few
@given(planned(seconds=coarse), st.permutations(range(16)))
@example(
    (
        Workload(layers=(cost(0, 0.125), cost(0, 0)), micro_batches=6, grains=6),
        (Stage(layers=range(1), members=(0, 1, 2)), Stage(layers=range(1, 2), members=(3,))),
        ((0, 0, 1, 1, 2, 2), (3,) * 6),
    ),
    [0, 2, 3, 1],
)
def test_a_schedule_does_not_depend_on_how_workers_are_called(case, names):
    workload, stages, routes = case
    lists, seconds = simulate(workload, stages, routes)
    called = [replace(stage, members=tuple(names[worker] for worker in stage.members)) for stage in stages]
    again = simulate(workload, called, [[names[worker] for worker in route] for route in routes])
    assert again == ({names[worker]: actions for worker, actions in lists.items()}, seconds)


@few
@given(planned())
def test_forwards_and_backwards_ascend_on_every_worker(case):
    for cells in schedule.build(*case).values():
        for kind in "FB":
            numbers = [action.micro_batch for action in cells if action.kind == kind]
            assert numbers == sorted(numbers)


def classic(depth: int, stage: int, micro_batches: int) -> list[str]:
    """1F1B as in the literature: depth - stage - 1 forwards to warm up, then pairs of forward and backward, then the rest."""
    warm_up = min(depth - stage - 1, micro_batches)
    cells = [f"{stage}F{m}" for m in range(warm_up)]
    for m in range(warm_up, micro_batches):
        cells += [f"{stage}F{m}", f"{stage}B{m - warm_up}"]
    return cells + [f"{stage}B{m}" for m in range(micro_batches - warm_up, micro_batches)]


@few
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), positive_eighths, positive_eighths)
def test_equal_stages_run_classic_1f1b(depth, width, grains_per_worker, grain, forward_s, backward_s):
    workload = Workload(
        layers=(cost(forward_s, backward_s),) * depth, micro_batches=width * grains_per_worker * grain, grains=width * grains_per_worker
    )
    stages = [Stage(layers=range(s, s + 1), members=tuple(range(s * width, (s + 1) * width))) for s in range(depth)]
    routes = [even_routes(workload.grains, stage.members) for stage in stages]
    lists, seconds = simulate(workload, stages, routes)
    each = grains_per_worker * grain
    for number, stage in enumerate(stages):
        for place, worker in enumerate(stage.members):
            shifted = [Action(a.stage, a.kind, a.micro_batch - place * each) for a in lists[worker]]
            assert [str(action) for action in shifted] == classic(depth, number, each)
    assert seconds == (each + depth - 1) * (forward_s + backward_s)


def test_the_default_for_unequal_widths_is_pinned_since_the_engine_runs_it():
    workload = Workload(layers=(cost(1, 2),) * 2, micro_batches=6, grains=6)
    stages = [Stage(layers=range(1), members=(0,)), Stage(layers=range(1, 2), members=(1, 2, 3))]
    lists = schedule.build(workload, stages, [even_routes(6, stage.members) for stage in stages])
    assert schedule.format(lists).splitlines() == [
        "0: 0F0 0F1 0B0 0F2 0B1 0F3 0B2 0F4 0B3 0F5 0B4 0B5",
        "1: 1F0 1B0 1F1 1B1",
        "2: 1F2 1B2 1F3 1B3",
        "3: 1F4 1B4 1F5 1B5",
    ]


WORKLOAD = Workload(layers=(cost(1, 1),) * 2, micro_batches=4, grains=2)
ROUTES = ((0, 0), (1, 2))
GOOD = """\
0: 0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3
1: 1F0 1B0 1F1 1B1
2: 1F2 1B2 1F3 1B3"""

DAMAGE = {
    "lost": ("1: 1F0 1B0 1F1 1B1", "1: 1F0 1B0 1F1", "1B1 is missing from worker 1"),
    "twice": ("1: 1F0 1B0 1F1 1B1", "1: 1F0 1B0 1F1 1B1 1B0", "1B0 is there twice:(?s:.*)1B1 >1B0<"),
    "elsewhere": ("1F1 1B1\n2:", "1F1\n2: 1B1", "1B1 is routed to worker 1, not to 2:(?s:.*)2: >1B1<"),
    "no such stage": ("1B3", "2B3", "2B3 is not part of the step:(?s:.*)>2B3<"),
    "no such micro-batch": ("1B3", "1B4", "1B4 is not part of the step:(?s:.*)>1B4<"),
    "too many in flight": ("0B0 0F2", "0F2 0B0", "more than 2 micro-batches in flight at stage 0:(?s:.*)>0F2< 0B0"),
    "deadlock": ("1F0 1B0 1F1 1B1", "1F0 1B0 1B1 1F1", r"deadlock:(?s:.*)>0B1< 0F3(?s:.*)>1B1< 1F1\n2: >1F2<|deadlock:(?s:.*)>1B1< 1F1"),
    "backward first": ("1F2 1B2", "1B2 1F2", "deadlock:(?s:.*)2: >1B2< 1F2"),
    "fold out of order": ("0B1 0F3 0B2 0B3", "0B1 0F3 0B3 0B2", "backwards of grain 1 are not in ascending order:(?s:.*)0B3 >0B2<"),
}


def test_the_good_one_passes():
    validate(schedule.parse(GOOD), WORKLOAD, ROUTES)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_and_marked(name):
    old, new, message = DAMAGE[name]
    assert old in GOOD
    with pytest.raises(PlanError, match=message):
        validate(schedule.parse(GOOD.replace(old, new)), WORKLOAD, ROUTES)


@few
@given(planned(), st.data())
def test_any_lost_or_swapped_pair_of_one_micro_batch_is_refused(case, data):
    workload, stages, routes = case
    lists = schedule.build(workload, stages, routes)
    worker = data.draw(st.sampled_from([worker for worker, cells in lists.items() if cells]))
    cells = list(lists[worker])
    place = data.draw(st.integers(0, len(cells) - 1))
    if data.draw(st.booleans()):
        del cells[place]
    else:
        stage, kind, micro_batch = cells[place]
        other = cells.index(Action(stage, "B" if kind == "F" else "F", micro_batch))
        cells[place], cells[other] = cells[other], cells[place]
    with pytest.raises(PlanError, match=r"missing|deadlock|in flight|ascending"):
        validate({**lists, worker: tuple(cells)}, workload, routes)
