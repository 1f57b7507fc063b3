"""Tests unequal workers: shares are exact, divisions have the least bottleneck, and plans shift work away from slow workers."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few, fleet, workloads

from elastic.errors import PlanError
from elastic.plan.plan import Plan
from elastic.plan.planner import fastest, staying, step_s
from elastic.plan.routing import even_routes, weighted_routes, weighted_shares
from elastic.plan.uneven import divide
from elastic.plan.workload import LayerCost, Workload

slowdown_lists = st.lists(st.floats(0.2, 8.0), min_size=1, max_size=5)


def equal_layers(layers: int = 8, micro_batches: int = 8) -> Workload:
    layer = LayerCost(forward_s=0.01, backward_s=0.02, parameters=1000, activation_bytes=0)
    return Workload(layers=(layer,) * layers, micro_batches=micro_batches, grains=micro_batches)


@few
@given(st.integers(1, 6), st.lists(st.floats(0.2, 8.0), min_size=1, max_size=3))
def test_shares_end_as_early_as_any(grains, slowdowns):
    shares = weighted_shares(grains, slowdowns)
    assert sum(shares) == grains
    every = (split for split in itertools.product(range(grains + 1), repeat=len(slowdowns)) if sum(split) == grains)
    best = min(max(share * slowdown for share, slowdown in zip(split, slowdowns, strict=True)) for split in every)
    assert max(share * slowdown for share, slowdown in zip(shares, slowdowns, strict=True)) == best


@given(st.integers(1, 40), st.lists(st.integers(0, 99), min_size=1, max_size=9, unique=True))
def test_equal_workers_have_even_routes(grains, members):
    assert weighted_routes(grains, members, {}) == even_routes(grains, members)


@pytest.mark.parametrize("slowdown", [0.0, -1.0, float("nan"), float("inf")])
def test_a_slowdown_that_is_none_is_refused(slowdown):
    with pytest.raises(PlanError, match="must be above 0 and finite"):
        weighted_shares(4, [1.0, slowdown])


def bottleneck(workload: Workload, slowdowns: list[float], parts) -> float:
    workers = iter(slowdowns)
    found = []
    for layers, count in parts:
        power = sum(1 / next(workers) for _ in range(count))
        found.append(sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in layers) / power)
    return max(found)


def divisions(layers: int, workers: int, stages: int):
    """All of them."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        runs = [range(a, b) for a, b in itertools.pairwise((0, *cuts, layers))]
        for places in itertools.combinations(range(1, workers), stages - 1):
            yield tuple(zip(runs, (b - a for a, b in itertools.pairwise((0, *places, workers))), strict=True))


@few
@given(workloads(), slowdown_lists, st.data())
def test_a_division_has_the_least_bottleneck(workload, slowdowns, data):
    stages = data.draw(st.integers(1, min(len(workload.layers), len(slowdowns))))
    found = divide(workload, fleet(range(len(slowdowns)), dict(enumerate(slowdowns))), stages)
    assert [layer for layers, _ in found for layer in layers] == list(range(len(workload.layers)))
    assert sum(count for _, count in found) == len(slowdowns)
    assert all(layers and count for layers, count in found)
    best = min(bottleneck(workload, slowdowns, parts) for parts in divisions(len(workload.layers), len(slowdowns), stages))
    assert bottleneck(workload, slowdowns, found) <= best * (1 + 1e-9) + 1e-11


def test_the_slow_one_of_two_gets_a_quarter():
    found = fastest(fleet([0, 1], {1: 3.0}), equal_layers(), 1)
    assert [found.routes[0].count(worker) for worker in (0, 1)] == [6, 2]
    assert "worker 1 takes 3 times as long" in found.why
    even = fastest(fleet([0, 1]), equal_layers(), 1)
    assert step_s(even, equal_layers(), fleet([0, 1], {1: 3.0})) / found.step_s > 1.9
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_stage_of_a_slow_worker_has_fewer_layers():
    found = fastest(fleet([0, 1, 2], {1: 4.0}), equal_layers(10, 16), 3)
    lengths = {stage.members[0]: len(stage.layers) for stage in found.stages}
    assert lengths[1] < min(lengths[0], lengths[2])


@few
@given(workloads(), slowdown_lists)
def test_what_is_known_of_speeds_never_makes_a_plan_slower(workload, slowdowns):
    factors = dict(enumerate(slowdowns))
    stages = min(2, len(workload.layers), len(slowdowns))
    found = fastest(fleet(factors, factors), workload, stages)
    if stages == 1:
        assert found.step_s <= step_s(fastest(fleet(factors), workload, stages), workload, fleet(factors, factors)) * (1 + 1e-9)
    assert sorted(found.workers) == list(factors)
    assert found.step_s == pytest.approx(step_s(found, workload, fleet(factors, factors)))


def test_a_plan_that_shrinks_weighs_what_is_left():
    before = fastest(fleet([0, 1, 2]), equal_layers(), 1)
    found = staying(before, fleet([0, 1], {1: 3.0}), equal_layers())
    assert found is not None
    assert [found.routes[0].count(worker) for worker in (0, 1)] == [6, 2]


def test_costs_of_nothing_can_be_divided():
    workload = replace(equal_layers(), layers=(LayerCost(forward_s=0.0, backward_s=0.0, parameters=0, activation_bytes=0),) * 4)
    assert [len(layers) for layers, _ in divide(workload, fleet([0, 1], {1: 2.0}), 2)] in ([1, 3], [2, 2], [3, 1])
