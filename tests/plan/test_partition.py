"""Tests the partition against all partitions."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import coarse, cost, few, workloads

from elastic.errors import PlanError
from elastic.plan.partition import partitioning
from elastic.plan.slicing import finish
from elastic.plan.workload import Workload

Parts = tuple[tuple[range, int], ...]


def partition(workload: Workload, workers: int, stages: int) -> Parts:
    return finish(partitioning(workload, workers, stages))


def objective(workload: Workload, parts: Parts) -> tuple[float, float, int]:
    times = []
    for layers, workers in parts:
        seconds = sum(workload.layers[layer].forward_s + workload.layers[layer].backward_s for layer in layers)
        times.append(seconds * -(-workload.grains // workers))
    return max(times), sum(times), max(sum(workload.layers[layer].parameters for layer in layers) for layers, _ in parts)


def compositions(total: int, parts: int) -> list[list[int]]:
    cuts = [(0, *inner, total) for inner in combinations(range(1, total), parts - 1)]
    return [[cut[i + 1] - cut[i] for i in range(parts)] for cut in cuts]


def all_partitions(layers: int, workers: int, stages: int) -> list[Parts]:
    return [
        tuple((range(sum(sizes[:i]), sum(sizes[: i + 1])), shares[i]) for i in range(stages))
        for sizes in compositions(layers, stages)
        for shares in compositions(workers, stages)
    ]


@few
@given(st.data())
def test_it_is_the_best_of_all(data):
    workload = data.draw(st.one_of(workloads(), workloads(seconds=coarse)))
    workers = data.draw(st.integers(1, 6))
    stages = data.draw(st.integers(1, min(workers, len(workload.layers))))
    found = partition(workload, workers, stages)
    everything = all_partitions(len(workload.layers), workers, stages)
    assert found in everything
    assert objective(workload, found) == min(objective(workload, parts) for parts in everything)


@pytest.mark.parametrize(("layers", "workers", "stages"), [(4, 3, 2), (4, 3, 3), (4, 5, 4), (10, 4, 2)])
def test_costs_that_binary_fractions_miss_tie_like_whole_numbers(layers, workers, stages):
    tenths, whole = (Workload(layers=(layer,) * layers, micro_batches=8, grains=8) for layer in (cost(0.1, 0.7, 1), cost(1, 7, 1)))
    assert partition(tenths, workers, stages) == partition(whole, workers, stages)


def test_equal_layers_are_halved():
    workload = Workload(layers=(cost(0.1, 0.2, 1),) * 10, micro_batches=8, grains=8)
    assert partition(workload, 4, 2) == ((range(5), 2), (range(5, 10), 2))


def test_workers_beyond_the_grains_go_where_parameters_are():
    workload = Workload(layers=(cost(1, 1, 10), cost(1, 1, 1000)), micro_batches=1, grains=1)
    assert partition(workload, 6, 2) == ((range(1), 1), (range(1, 2), 5))


@pytest.mark.parametrize(
    ("workers", "stages", "message"),
    [(4, 4, "at most 3 stages"), (2, 3, "add workers"), (4, 0, "at least one"), (0, 1, "there are 0")],
)
def test_infeasible_requests_say_what_to_do(workers, stages, message):
    workload = Workload(layers=(cost(1, 1),) * 3, micro_batches=1, grains=1)
    with pytest.raises(PlanError, match=message):
        partition(workload, workers, stages)
