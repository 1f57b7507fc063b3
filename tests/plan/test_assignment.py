"""Tests that relabelling slots moves least: as good as scipy's linear assignment, and deterministic in order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few
from scipy.optimize import linear_sum_assignment

from elastic.plan.assignment import assign
from elastic.plan.plan import Plan, Stage
from elastic.plan.routing import even_routes


def plan_of(cuts: list[int], widths: list[int], workers: list[int], grains: int = 4) -> Plan:
    rest = iter(workers)
    stages = tuple(
        Stage(layers=range(cuts[i], cuts[i + 1]), members=tuple(next(rest) for _ in range(width))) for i, width in enumerate(widths)
    )
    return Plan(stages=stages, routes=tuple(even_routes(grains, stage.members) for stage in stages), step_s=1.0, why="test")


@st.composite
def plans(draw, layers: int, workers: list[int]) -> Plan:
    depth = draw(st.integers(1, min(layers, len(workers))))

    def cuts(length: int) -> list[int]:
        inner = draw(st.sets(st.integers(1, length - 1), min_size=depth - 1, max_size=depth - 1)) if depth > 1 else []
        return [0, *sorted(inner), length]

    bounds = cuts(len(workers))
    return plan_of(cuts(layers), [bounds[i + 1] - bounds[i] for i in range(depth)], workers)


def common(plan: Plan, old: Plan, weights: list[int]) -> int:
    held = {worker: set(stage.layers) for stage in old.stages for worker in stage.members}
    return sum(weights[layer] for stage in plan.stages for worker in stage.members for layer in set(stage.layers) & held.get(worker, set()))


@pytest.mark.slow
@few
@given(st.data())
def test_no_other_assignment_keeps_more(data):
    layers = data.draw(st.integers(1, 8))
    weights = data.draw(st.lists(st.integers(0, 9), min_size=layers, max_size=layers))
    before = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=9, unique=True))
    after = data.draw(st.lists(st.sampled_from([*before, 40, 41, 42]), min_size=1, max_size=9, unique=True))
    old, new = data.draw(plans(layers, before)), data.draw(plans(layers, after))
    found = assign(new, old, weights)
    assert sorted(found.workers) == sorted(after)
    assert found.summary == new.summary
    held = {worker: set(stage.layers) for stage in old.stages for worker in stage.members}
    slots = [set(stage.layers) for stage in new.stages for _ in stage.members]
    worth = np.array([[sum(weights[layer] for layer in slot & held.get(worker, set())) for slot in slots] for worker in after])
    rows, columns = linear_sum_assignment(worth, maximize=True)
    assert common(found, old, weights) == worth[rows, columns].sum()
    for was, now, route, routed in zip(new.stages, found.stages, new.routes, found.routes, strict=True):
        assert [was.members.index(worker) for worker in route] == [now.members.index(worker) for worker in routed]
        known = [worker for worker in now.members if worker in held]
        assert known == sorted(known, key=old.workers.index)
        assert now.members[: len(known)] == tuple(known)


def test_who_stays_keeps_its_stage_and_a_joiner_fills_the_gap():
    old = plan_of([0, 4, 8], [2, 2], [0, 1, 2, 3])
    found = assign(plan_of([0, 4, 8], [2, 2], [0, 2, 3, 9]), old, [1] * 8)
    assert [stage.members for stage in found.stages] == [(0, 9), (2, 3)]
    assert found.routes == ((0, 0, 9, 9), (2, 2, 3, 3))


def test_heavy_layers_decide():
    old = plan_of([0, 4, 8], [1, 1], [0, 1])
    new = plan_of([0, 8], [1], [1])
    assert assign(new, old, [1] * 8).workers == (1,)
    old, new = plan_of([0, 1, 2, 3], [1, 1, 1], [0, 1, 2]), plan_of([0, 2, 3], [1, 1], [0, 1])
    assert assign(new, old, [1, 5, 1]).workers == (1, 0)


def test_the_same_plan_stays():
    old = plan_of([0, 2, 5, 8], [3, 1, 2], [5, 3, 4, 9, 1, 0])
    assert assign(old, old, [0, 1, 2, 3, 4, 5, 6, 7]) == old
    shuffled = replace(plan_of([0, 2, 5, 8], [3, 1, 2], [0, 1, 3, 4, 5, 9]))
    assert assign(shuffled, old, [1] * 8) == old


def test_three_hundred_workers_are_assigned_once_each():
    old = plan_of([8 * i for i in range(17)], [20] * 15 + [4], list(range(304)))
    new = plan_of([0, *(10 * i + 5 for i in range(12)), 128], [24] * 12 + [15], list(range(1, 304)))
    found = assign(new, old, [1] * 128)
    assert max(Counter(found.workers).values()) == 1
