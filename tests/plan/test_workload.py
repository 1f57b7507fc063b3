"""Tests workloads: validation, and the micro-batches of each grain."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import cost, few, workloads

from elastic.errors import PlanError
from elastic.plan.workload import Workload, costs, default_grains


@few
@given(workloads())
def test_grains_are_equal_runs_that_cover_the_step(workload):
    runs = [workload.micro_batches_of(grain) for grain in range(workload.grains)]
    assert [m for run in runs for m in run] == list(range(workload.micro_batches))
    assert len({len(run) for run in runs}) == 1
    assert all(workload.grain_of(m) == grain for grain, run in enumerate(runs) for m in run)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_json_round_trip_is_exact(forward_s, backward_s):
    layers = (cost(forward_s, backward_s, 3), cost(0.1, 0.2), replace(cost(0.1, 0.2), flops=7, frozen_bytes=5000))
    workload = Workload(layers=layers, micro_batches=12, grains=4)
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload


@given(st.integers(1, 1000))
def test_default_grains_is_the_largest_divisor_up_to_16(micro_batches):
    grains = default_grains(micro_batches)
    assert grains <= 16
    assert micro_batches % grains == 0
    assert all(micro_batches % other for other in range(grains + 1, 17))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", range(4))
def test_impossible_costs_are_refused(field, value):
    profile = [0.0, 0.0, 0, 0]
    profile[field] = value
    with pytest.raises(PlanError, match=("forward_s", "backward_s", "parameters", "activation_bytes")[field]):
        costs([profile])


@pytest.mark.parametrize(("micro_batches", "grains"), [(8, 3), (0, 1), (8, 0), (-8, 4), (8, -4)])
def test_grains_must_divide_micro_batches(micro_batches, grains):
    with pytest.raises(PlanError, match="cannot be cut"):
        Workload(layers=(cost(1, 1),), micro_batches=micro_batches, grains=grains)


def test_a_workload_without_layers_is_refused():
    with pytest.raises(PlanError, match="at least one layer"):
        Workload(layers=(), micro_batches=1, grains=1)
