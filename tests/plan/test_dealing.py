"""Tests micro-batches that are dealt out among stages of different widths: evenly, within memory, and only where that is faster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from plan_strategies import coarse, cost, few, fleet, planned, splitting, step_seconds
from schedule_checks import validate

from elastic.engine.reduction import Meter, VectorFold
from elastic.plan import dealing, schedule
from elastic.plan.job_costs import JobCosts
from elastic.plan.memory import needs_in, shortfall
from elastic.plan.plan import Plan, Stage
from elastic.plan.planner import fastest, plan
from elastic.plan.prediction import predict
from elastic.plan.routing import even_routes
from elastic.plan.simulation import simulate
from elastic.plan.workload import Workload

LAYERS = Workload(layers=(cost(1, 2, parameters=1000),) * 16, micro_batches=32, grains=32)


def staged(workload: Workload, layers: list[int], widths: list[int]) -> tuple[tuple[Stage, ...], tuple[tuple[int, ...], ...]]:
    """Stages of so many layers and workers, with even routes."""
    stages = tuple(
        Stage(layers=range(sum(layers[:at]), sum(layers[: at + 1])), members=tuple(range(sum(widths[:at]), sum(widths[: at + 1]))))
        for at in range(len(layers))
    )
    return stages, tuple(even_routes(workload.grains, stage.members) for stage in stages)


@st.composite
def routed(draw):
    """A workload and arbitrary routes through it, as they are after losses."""
    workload, stages, _ = draw(planned())
    return workload, tuple(tuple(draw(st.sampled_from(stage.members)) for _ in range(workload.grains)) for stage in stages)


@few
@given(planned(seconds=coarse))
def test_dealt_schedules_are_valid_and_take_the_simulated_time(case):
    workload, stages, routes = case
    lists, seconds = simulate(workload, stages, routes, dealt=True)
    validate(lists, workload, routes, dealt=True)
    assert schedule.build(workload, stages, routes, dealt=True) == lists
    assert seconds == step_seconds(lists, workload, stages)


@few
@given(planned(), st.lists(st.integers(0, 4), min_size=6, max_size=6))
def test_their_backwards_may_be_split(case, shares):
    workload, stages, routes = case
    workload = splitting(workload, shares)
    lists, seconds = simulate(workload, stages, routes, split=True, dealt=True)
    validate(lists, workload, routes, dealt=True)
    assert seconds == step_seconds(lists, workload, stages)


@few
@given(routed())
def test_all_workers_run_them_in_one_order_whatever_the_routes(case):
    workload, routes = case
    order = dealing.order(workload, routes)
    assert sorted(order) == list(range(workload.micro_batches))
    stages = [Stage(layers=range(at, at + 1), members=tuple(sorted(set(route)))) for at, route in enumerate(routes)]
    lists = schedule.build(workload, stages, routes, dealt=True)
    validate(lists, workload, routes, dealt=True)
    for actions in lists.values():
        for kind in "FB":
            places = [order.index(action.micro_batch) for action in actions if action.kind == kind]
            assert places == sorted(places)


@few
@given(routed())
def test_every_worker_gets_its_share_of_every_part_of_the_step(case):
    """After any part of the step each path lacks, or exceeds, its share by at most half a micro-batch; a worker is on some of the paths."""
    workload, routes = case
    order = dealing.order(workload, routes)
    for route in routes:
        for worker in set(route):
            own = [m for m in range(workload.micro_batches) if route[workload.grain_of(m)] == worker]
            paths = len({tuple(each[workload.grain_of(m)] for each in routes) for m in range(workload.micro_batches)})
            for done in range(len(order) + 1):
                had = len(set(order[:done]).intersection(own))
                assert abs(had - done * len(own) / len(order)) <= paths


@few
@given(routed(), st.booleans())
def test_the_sums_are_those_that_the_engine_holds(case, dealt):
    workload, routes = case
    size = workload.micro_batches // workload.grains
    order = dealing.order(workload, routes) if dealt else range(workload.micro_batches)
    for route, sums in zip(routes, dealing.sums(workload, routes, dealt=dealt), strict=True):
        for worker, own in dealing.by_worker(order, workload, route).items():
            meter = Meter()
            fold = VectorFold(workload.grains, size, 1, meter)
            kept = 0
            for micro_batch in own:
                under_way = fold._open.keys() | {workload.grain_of(micro_batch)}
                kept = max(kept, len(fold.sums.nodes) + len(under_way))
                fold.add(workload.grain_of(micro_batch), [torch.ones(1)])
            assert sums[worker] == kept
            assert kept <= meter.peak <= kept + (size > 1)  # and the gradient that is added to a grain under way


@pytest.mark.parametrize("widths", [[1], [4], [2, 2], [3, 3, 3]])
def test_nothing_changes_where_widths_are_equal(widths):
    workload = replace(LAYERS, micro_batches=24, grains=12)
    stages, routes = staged(workload, [16 // len(widths)] * (len(widths) - 1) + [16 - 16 // len(widths) * (len(widths) - 1)], widths)
    assert not dealing.changes(workload, routes)
    assert simulate(workload, stages, routes, dealt=True) == simulate(workload, stages, routes)
    assert needs_in(workload, stages, routes, fleet(range(9)), dealt=True) == needs_in(workload, stages, routes, fleet(range(9)))


def test_a_narrow_stage_serves_the_workers_of_a_wide_one_in_turn():
    workload = Workload(layers=(cost(2, 4), cost(1, 2)), micro_batches=6, grains=6)
    stages, routes = staged(workload, [1, 1], [2, 1])
    assert dealing.order(workload, routes) == (0, 3, 1, 4, 2, 5)
    assert schedule.format(schedule.build(workload, stages, routes, dealt=True)).splitlines() == [
        "0: 0F0 0F1 0B0 0F2 0B1 0B2",
        "1: 0F3 0F4 0B3 0F5 0B4 0B5",
        "2: 1F0 1B0 1F3 1B3 1F1 1B1 1F4 1B4 1F2 1B2 1F5 1B5",
    ]


@pytest.mark.parametrize(
    ("layers", "widths", "ascending", "most"),
    [
        ([11, 5], [2, 1], 1.9, 1.04),
        ([5, 11], [1, 2], 1.9, 1.06),
        ([8, 8], [3, 2], 2.0, 1.07),
        ([8, 8], [2, 3], 2.0, 1.07),
        ([10, 6], [3, 2], 2.7, 1.17),
        ([7, 9], [3, 4], 3.7, 1.22),
        ([5, 6, 5], [2, 2, 1], 1.2, 1.07),
        ([4] * 4, [1, 2, 2, 2], 1.05, 1.04),
    ],
)
def test_unequal_widths_are_nearly_as_fast_as_their_busiest_worker(layers, widths, ascending, most):
    """In ascending order they took up to 3.7 times as long as it computes."""
    stages, routes = staged(LAYERS, layers, widths)
    busiest_s = max(3 * count * -(-LAYERS.micro_batches // width) for count, width in zip(layers, widths, strict=True))
    assert simulate(LAYERS, stages, routes)[1] > ascending * busiest_s
    assert simulate(LAYERS, stages, routes, dealt=True)[1] <= most * busiest_s


def test_a_job_deals_where_it_is_faster_and_says_so():
    found = fastest(fleet(range(3)), LAYERS, 2)
    assert found.dealt
    assert "dealt out in turn" in found.why
    assert Plan.from_json(found.to_json()) == found
    even = fastest(fleet(range(4)), LAYERS, 2)
    assert not even.dealt
    assert "dealt out" not in even.why


def test_after_a_loss_steps_lengthen_by_little_more_than_the_lost_share():
    """4 workers in 2 stages lose one: at best a step takes 4/3 of the time. In ascending order it took 2.1 times as long."""
    before = fastest(fleet(range(4)), LAYERS, 2)
    after = plan(fleet([0, 1, 2]), LAYERS, before, 1e6, stages=2).plan
    assert after.dealt
    assert after.step_s <= 1.06 * before.step_s * 4 / 3


def test_a_job_does_not_deal_where_that_does_not_fit_into_memory():
    workload = Workload(layers=tuple(replace(layer, activation_bytes=1000) for layer in LAYERS.layers), micro_batches=32, grains=32)
    stages, routes = staged(workload, [5, 11], [1, 2])
    dealt, ascending = (round(needs_in(workload, stages, routes, fleet(range(3)), dealt=dealt)[0].total) for dealt in (True, False))
    assert dealt - ascending == 5 * (1000 + 3 * 4000)  # in each layer of the narrow stage one micro-batch and three sums of gradients more
    for memory, fits in ((dealt, True), (dealt - 1, False)):
        limited = fleet(range(3), memory={0: memory})
        assert not shortfall(workload, stages, routes, limited)[1]
        assert predict(JobCosts(workload, limited), stages, routes).dealt is fits


@few
@given(planned(seconds=coarse), st.permutations(range(16)))
@example((LAYERS, *staged(LAYERS, [11, 5], [2, 1])), [*range(15, -1, -1)])
def test_a_dealt_schedule_does_not_depend_on_how_workers_are_called(case, names):
    workload, stages, routes = case
    lists, seconds = simulate(workload, stages, routes, dealt=True)
    called = [replace(stage, members=tuple(names[worker] for worker in stage.members)) for stage in stages]
    again = simulate(workload, called, [[names[worker] for worker in route] for route in routes], dealt=True)
    assert again == ({names[worker]: actions for worker, actions in lists.items()}, seconds)
