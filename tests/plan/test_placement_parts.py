"""Tests the parts of the placement search: pairings, paths, swaps and seeds, each against a slower, simpler computation."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from placement_networks import regions
from scipy.optimize import linear_sum_assignment

from elastic.plan.placement.arrangement import arranged, bound, boundary_bounds
from elastic.plan.placement.chunks import chunked
from elastic.plan.placement.pairing import bottleneck_pairing, uneven_pairing_s
from elastic.plan.placement.path import path_cost, shortest_path
from elastic.plan.placement.search import Space, best_found, seeds
from elastic.plan.placement.seeds import near_order, tiled
from elastic.plan.placement.swaps import Grid, swap_costs

several = settings(max_examples=60, deadline=None)
whole = st.integers(0, 9).map(float)


def symmetric(seed: int, size: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).uniform(size=(size, size))
    matrix += matrix.T
    np.fill_diagonal(matrix, 0)
    return matrix


@several
@given(st.integers(1, 6).flatmap(lambda size: arrays(float, (size, size), elements=whole)))
def test_no_pairing_has_a_faster_slowest_link(costs):
    size = len(costs)
    found, partner = bottleneck_pairing(costs)
    assert sorted(partner) == list(range(size))
    assert max(costs[row, column] for row, column in enumerate(partner)) == found
    assert found == min(max(costs[row, column] for row, column in enumerate(order)) for order in permutations(range(size)))


@pytest.mark.parametrize("size", [8, 30, 70])
def test_large_pairings_agree_with_linear_assignment(size):
    costs = np.random.default_rng(size).uniform(size=(size, size))
    found, _ = bottleneck_pairing(costs)
    for limit, possible in ((found, True), (found - 1e-12, False)):
        forbidden = (costs > limit).astype(float)
        assert (not forbidden[linear_sum_assignment(forbidden)].any()) is possible


@several
@given(st.integers(1, 3).flatmap(lambda size: st.integers(size, 5).flatmap(lambda more: arrays(float, (more, size), elements=whole))))
def test_pairings_of_unequal_groups_share_evenly(costs):
    larger, smaller = costs.shape
    choices = [()]
    for _ in range(larger):
        choices = [(*choice, column) for choice in choices for column in range(smaller)]
    shares = (larger // smaller, math.ceil(larger / smaller))
    fair = [choice for choice in choices if all(choice.count(column) in shares for column in range(smaller))]
    assert uneven_pairing_s(costs) == min(max(costs[row, column] for row, column in enumerate(choice)) for choice in fair)


@several
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_no_order_of_few_groups_is_shorter(seed, size):
    costs = symmetric(seed, size)
    path = shortest_path(costs)
    assert sorted(path) == list(range(size))
    best = min(sum(costs[a, b] for a, b in pairwise(order)) for order in permutations(range(size)))
    assert path_cost(costs, path) == pytest.approx(best)


def test_the_order_of_many_groups_on_a_line_is_the_line():
    at = np.random.default_rng(0).permutation(40).astype(float)
    path = shortest_path(np.abs(at[:, None] - at))
    assert path_cost(np.abs(at[:, None] - at), path) == 39


def plain(exchange: np.ndarray, boundary: np.ndarray, grid: np.ndarray) -> float:
    """The cost of a grid with its lanes as they are."""
    slowest = max(exchange[np.ix_(group, group)].sum(axis=1).max() for group in grid)
    return slowest + 2 * sum(boundary[one, two].max() for one, two in pairwise(grid))


@pytest.mark.parametrize(("devices", "stages"), [(2, 2), (6, 3), (8, 2), (7, 7), (12, 4), (20, 4)])
def test_swaps_cost_what_the_swapped_placement_does(devices, stages):
    exchange, boundary = symmetric(1, devices), symmetric(2, devices)
    grid, random = Grid(exchange, boundary, stages), np.random.default_rng(3)
    grid.place(random.permutation(devices))
    grid.swap(0, devices - 1)
    rows = np.array(sorted({0, devices // 2, devices - 1}))
    costs = swap_costs(grid, rows)
    before = [exchange[np.ix_(group, group)].sum(axis=1).max() for group in grid.devices.reshape(stages, -1)]
    assert grid.cost_s == pytest.approx(plain(exchange, boundary, grid.devices.reshape(stages, -1)))
    for row, one in enumerate(rows):
        for two in range(devices):
            after = grid.devices.copy()
            after[[one, two]] = after[[two, one]]
            if one != two:
                groups = after.reshape(stages, -1)
                assert costs.cost[row, two] == pytest.approx(plain(exchange, boundary, groups))
                total = sum(exchange[np.ix_(group, group)].sum(axis=1).max() for group in groups) - sum(before)
                assert costs.total[row, two] == pytest.approx(total)


def test_only_swaps_of_critical_slots_can_help():
    grid = Grid(symmetric(5, 24), symmetric(6, 24), 4)
    rest = np.setdiff1d(np.arange(24), grid.critical())
    costs = swap_costs(grid, rest).cost
    assert (costs[:, rest] >= grid.cost_s - 1e-12).all()


def test_arranging_keeps_groups_costs_no_more_and_no_less_than_the_bound():
    exchange, boundary = symmetric(7, 24), symmetric(8, 24)
    devices = np.random.default_rng(1).permutation(24)
    better = arranged(devices, boundary, 4)
    assert {frozenset(group) for group in better.reshape(4, 6)} == {frozenset(group) for group in devices.reshape(4, 6)}
    assert plain(exchange, boundary, better.reshape(4, 6)) <= plain(exchange, boundary, devices.reshape(4, 6))
    assert bound(devices, exchange, boundary, 4) <= plain(exchange, boundary, better.reshape(4, 6))
    groups = devices.reshape(4, 6)
    exact = [[bottleneck_pairing(boundary[np.ix_(a, b)])[0] if i != j else 0 for j, b in enumerate(groups)] for i, a in enumerate(groups)]
    assert (boundary_bounds(boundary, groups) <= np.array(exact)).all()


def test_near_order_keeps_clusters_and_clusters_of_clusters_together():
    host, zone = np.arange(24) // 3, np.arange(24) // 12
    shuffled = np.random.default_rng(0).permutation(24)
    host, zone = host[shuffled], zone[shuffled]
    costs = 1.0 + (host[:, None] != host) + 5.0 * (zone[:, None] != zone)
    order = near_order(costs)
    for label, count in ((host, 8), (zone, 2)):
        assert 1 + sum(label[a] != label[b] for a, b in pairwise(order)) == count


def test_tiles_go_from_whole_groups_to_whole_lanes_and_fill_every_slot_once():
    orders = list(tiled(4, 6))
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert any((order == np.arange(24)).all() for order in orders)
    assert any((order == np.arange(24).reshape(4, 6).T.reshape(-1)).all() for order in orders)
    assert len({order.tobytes() for order in orders}) == len(orders)


def test_chunks_leave_no_remainder_where_runs_of_five_and_three_fit():
    sizes = [26, 11, 27]
    cluster = np.repeat(np.arange(3), sizes)
    boundary = 1.0 + 9.0 * (cluster[:, None] != cluster)
    grids = [cluster[devices].reshape(8, 8) for devices in chunked(np.arange(64), boundary, 8)]
    assert min(sum(len({*map(tuple, np.sort(pair, axis=1))}) - 1 for pair in pairwise(grid)) for grid in grids) == 1


@pytest.mark.parametrize(("devices", "stages"), [(24, 4), (23, 4), (21, 4), (5, 5), (40, 2)])
def test_seeds_and_results_place_all_devices_with_a_blank_at_most_in_a_group(devices, stages):
    latency, _ = regions(1, devices, count=3)
    lanes = -(-devices // stages)
    latency = latency + latency.T
    np.fill_diagonal(latency, 0)
    space = Space(latency, latency, stages, stages * lanes - devices)
    for placed in [*seeds(space), *best_found(space, 0, 1_000_000)]:
        assert sorted(placed) == list(range(stages * lanes))
        assert space.blank[placed].reshape(stages, lanes).sum(axis=1).max() <= 1
