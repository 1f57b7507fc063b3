"""Tests plans: they conserve the batch, have the fastest number of stages, and explain a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from plan_strategies import cost, few, fleet, step_seconds, workloads

from elastic.errors import PlanError
from elastic.plan import schedule
from elastic.plan.fleet import HOST
from elastic.plan.memory import needs
from elastic.plan.planner import Plan, Stage, fastest, staying, step_s
from elastic.plan.site import WITHIN, Site
from elastic.plan.workload import Workload

worker_lists = st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True)


def equal_layers(layers: int, parameters: int = 1000, micro_batches: int = 16) -> Workload:
    return Workload(layers=(cost(0.01, 0.02, parameters),) * layers, micro_batches=micro_batches, grains=micro_batches)


@few
@given(workloads(), worker_lists)
def test_every_stage_computes_every_micro_batch_once(workload, workers):
    found = fastest(fleet(workers), workload)
    assert found.workers == tuple(workers)
    assert [layer for stage in found.stages for layer in stage.layers] == list(range(len(workload.layers)))
    for number, stage in enumerate(found.stages):
        computed = [m for worker in stage.members for m in found.micro_batches_of(worker, workload)]
        assert sorted(computed) == list(range(workload.micro_batches))
        assert all(found.stage_of(worker) == number for worker in stage.members)


@few
@given(workloads(), worker_lists)
def test_it_is_the_fastest_number_of_stages_and_the_fewest_of_equals(workload, workers):
    found = fastest(fleet(workers), workload)
    fixed = [fastest(fleet(workers), workload, count) for count in range(1, min(len(workers), len(workload.layers)) + 1)]
    assert [len(each.stages) for each in fixed] == list(range(1, len(fixed) + 1))
    least_s = min(each.step_s for each in fixed)
    assert found.step_s == least_s
    assert len(found.stages) == min(len(each.stages) for each in fixed if each.step_s == least_s)


@few
@given(workloads(), worker_lists)
@example(Workload(layers=(cost(0, 0.125), cost(0, 0, 10**8)), micro_batches=6, grains=6), [0, 2, 3, 1])
def test_the_prediction_is_the_simulated_step_plus_the_exchange(workload, workers):
    found = fastest(fleet(workers), workload)
    lists = schedule.build(workload, found.stages, found.routes, dealt=found.dealt)
    exchange = 0.0
    for stage in found.stages:
        n, elements = len(stage.members), sum(workload.layers[layer].parameters for layer in stage.layers)
        if n > 1 and elements:
            exchange = max(exchange, 2 * (WITHIN.latency_s + 4 * elements * (n - 1) / n / WITHIN.bytes_per_s))
    assert found.step_s == pytest.approx(step_seconds(lists, workload, found.stages) + exchange)


def test_large_parameters_favour_stages_and_small_ones_do_not():
    assert len(fastest(fleet(range(4)), equal_layers(8, parameters=1000)).stages) == 1
    assert len(fastest(fleet(range(4)), equal_layers(8, parameters=100_000_000)).stages) > 1


@pytest.mark.parametrize(("workers", "stages", "seconds"), [(3, 2, 1.79), (4, 2, 1.35), (6, 2, 0.95), (6, 3, 0.96)])
def test_stages_that_would_wait_for_each_other_are_not_chosen(workers, stages, seconds):
    """Seconds are the least of all partitions, found by trying each; where the bottleneck alone decides it takes up to three times that."""
    workload = equal_layers(10, parameters=0)
    assert fastest(fleet(range(workers)), workload, stages).step_s == pytest.approx(seconds, rel=0.05)


def test_ties_go_to_fewer_stages():
    idle = Workload(layers=(cost(0, 0),) * 4, micro_batches=4, grains=4)
    assert [fastest(fleet(range(4)), idle, count).step_s for count in range(1, 5)] == [0.0] * 4
    assert len(fastest(fleet(range(4)), idle).stages) == 1


def test_summary_and_why():
    found = fastest(fleet([3, 1, 2, 0]), equal_layers(10), 2)
    assert found.summary == "[0-4]x2 [5-9]x2"
    assert [stage.members for stage in found.stages] == [(3, 1), (2, 0)]
    assert found.why.startswith("2 stages, as asked: ")
    assert "workers [2, 3] get no grain" in fastest(fleet(range(4)), equal_layers(1, micro_batches=2)).why


@few
@given(workloads(), worker_lists)
def test_json_round_trip(workload, workers):
    found = fastest(fleet(workers), workload)
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("workers", "stages", "message"),
    [
        (range(4), 11, "11 stages need 11 layers and the model has 10"),
        (range(4), 5, "5 stages need 5 workers and there are 4"),
        (range(4), 0, "0 stages"),
        ((), None, "at least one worker"),
        ((1, 1), None, "only once"),
    ],
)
def test_infeasible_requests_say_what_to_do(workers, stages, message):
    with pytest.raises(PlanError, match=message):
        fastest(fleet(workers), equal_layers(10), stages)


GOOD = fastest(fleet(range(4)), equal_layers(4), 2)
DAMAGE = {
    "layers missing": ({"stages": (GOOD.stages[0], Stage(layers=range(3, 4), members=(2, 3)))}, "layer 2 comes next"),
    "no layers": ({"stages": (GOOD.stages[0], Stage(layers=range(2, 2), members=(2, 3)))}, "stage 1 has layers"),
    "no members": ({"stages": (GOOD.stages[0], Stage(layers=range(2, 4), members=()))}, "stage 1 has layers"),
    "worker twice": ({"stages": (GOOD.stages[0], Stage(layers=range(2, 4), members=(1, 2)))}, "two places"),
    "route missing": ({"routes": GOOD.routes[:1]}, "as many routes"),
    "route short": ({"routes": (GOOD.routes[0], GOOD.routes[1][:-1])}, "equal length"),
    "route leaves the stage": ({"routes": (GOOD.routes[1], GOOD.routes[0])}, r"routes of stage 0 name workers \[2, 3\]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_plans_are_refused(name):
    changes, message = DAMAGE[name]
    with pytest.raises(PlanError, match=message):
        replace(GOOD, **changes)


def test_a_worker_without_a_stage_is_refused():
    with pytest.raises(PlanError, match="worker 9 has no stage"):
        GOOD.stage_of(9)


@few
@given(workloads(), worker_lists.filter(lambda workers: len(workers) > 1), st.data())
def test_a_plan_that_shrinks_keeps_its_layers_and_what_the_others_compute(workload, workers, data):
    before = fastest(fleet(workers), workload)
    lost = data.draw(st.sampled_from(workers))
    found = staying(before, fleet([worker for worker in workers if worker != lost]), workload)
    alone = any(stage.members == (lost,) for stage in before.stages)
    assert (found is None) == alone
    if found is None:
        return
    assert [stage.layers for stage in found.stages] == [stage.layers for stage in before.stages]
    assert found.workers == tuple(worker for worker in workers if worker != lost)
    for was, now in zip(before.routes, found.routes, strict=True):
        assert all(a == b for a, b in zip(was, now, strict=True) if a != lost)
    assert found.why.startswith(f"{len(found.stages)} stage{'s'[: len(found.stages) - 1]}, every stage keeps its layers")


def test_backwards_are_split_where_that_is_faster_and_fits():
    def layered(**more: Any) -> Workload:
        return Workload(layers=(cost(1, 2, 10, **more),) * 4, micro_batches=4, grains=4)

    two = fleet([0, 1])
    whole, parts = fastest(two, layered(), 2), fastest(two, layered(input_s=1, weight_s=1), 2)
    assert (whole.split, parts.split) == (False, True)
    assert (whole.step_s, parts.step_s) == (30, 26)
    assert step_s(parts, layered(input_s=1, weight_s=1), two) == 26, "a plan in force must not seem slower than itself"
    assert step_s(whole, layered(), two) == 30
    assert parts.why.endswith("backwards in two parts, the second in waiting times, take 4 s off a step")
    assert Plan.from_json(parts.to_json()) == parts
    assert not fastest(two, layered(input_s=2, weight_s=2), 2).split, "two parts that take longer than the whole"
    assert not fastest(two, layered(input_s=1, weight_s=1), 1).split
    crowded = replace(two, site=Site(places={HOST: 1}))
    assert not fastest(crowded, layered(input_s=1, weight_s=1), 2).split
    heavy = Workload(layers=(replace(layered(input_s=1, weight_s=1).layers[0], activation_bytes=1000),) * 4, micro_batches=4, grains=4)
    needed = max(need.total for need in needs(heavy, parts.stages, parts.routes).values())
    assert fastest(replace(two, memory={0: int(needed), 1: int(needed)}), heavy, 2).split, "the first stage holds as many"
    tight = replace(two, memory={0: int(needed), 1: int(needed) - 2000})
    assert not fastest(tight, heavy, 2).split
