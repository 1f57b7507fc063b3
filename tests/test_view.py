"""Tests the view: places, coordinator, and an exact, small JSON form."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import SettingsError
from elastic.layout.invariants import check
from elastic.layout.layout import spread
from elastic.layout.regions import LayerSpec, ModelSpec
from elastic.plan.fleet import Fleet
from elastic.plan.planner import fastest
from elastic.plan.site import Site
from elastic.plan.workload import LayerCost, Workload
from elastic.view import Member, View


def view_of(workers: list[int], layers: int, stages: int | None = None, width: int = 64) -> View:
    tensors = [("attention.in", (3 * width, width)), ("attention.out", (width, width)), ("mlp.in", (4 * width, width)), ("norm", (width,))]
    model = ModelSpec(
        layers=tuple(LayerSpec.build(i, [(f"model.layers.{i}.{name}", shape, "float32") for name, shape in tensors]) for i in range(layers))
    )
    costs = tuple(LayerCost(forward_s=0.1 + i / 7, backward_s=0.3, parameters=9, activation_bytes=1000) for i in range(layers))
    workload = Workload(layers=costs, micro_batches=16, grains=16)
    planned = fastest(Fleet(workers=tuple(workers)), workload, stages)
    layout = spread(model, [(stage.layers, stage.members) for stage in planned.stages])
    members = tuple(Member(worker=worker, host="host", address=f"unix:@elastic-{worker:016x}") for worker in workers)
    return View(epoch=3, attempt=1, members=members, plan=planned, layout=layout, workload=workload)


def test_workers_that_share_processors_do_not_add_to_the_peak():
    view = view_of([0, 1, 2, 3], 1)
    members = tuple(replace(member, host="aaab"[place]) for place, member in enumerate(view.members))
    fast = replace(view.workload, peak_flops=100.0)
    view = replace(view, members=members, workload=fast, site=Site(places={"a": 2.0, "b": 8.0}))
    assert view.peak_flops == 300.0
    assert replace(view, members=tuple(replace(member, device="cuda") for member in members)).peak_flops == 400.0
    assert view_of([0, 1], 1).peak_flops == 0.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True), st.integers(1, 6))
def test_json_round_trip_is_exact(workers, layers):
    view = view_of(workers, layers)
    check(view.layout)
    assert View.from_json(json.loads(json.dumps(view.to_json()))) == view


def test_places_follow_the_order_of_members():
    view = view_of([7, 3, 5], 3)
    assert [view.place(worker) for worker in (7, 3, 5)] == [0, 1, 2]
    assert view.coordinator == 7
    assert view.workers == (7, 3, 5)
    with pytest.raises(SettingsError, match="worker 4 is not a member of epoch 3"):
        view.place(4)


@pytest.mark.parametrize(
    ("keep", "message"),
    [((), "at least one member"), ((0, 0, 1), "only once"), ((0,), r"names workers \[1\]")],
)
def test_impossible_members_are_refused(keep, message):
    view = view_of([0, 1], 2)
    with pytest.raises(SettingsError, match=message):
        replace(view, members=tuple(view.members[place] for place in keep))


def test_it_stays_small():
    size = len(json.dumps(view_of(list(range(8)), 24, 4, width=1024).to_json(), separators=(",", ":")))
    assert size < 10_000
