"""Tests `spread`: coverage, balance, replicas, and the queries of a layout."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import few, host_maps, layouts, models, stages_for, units, worker_lists

from elastic.errors import LayoutError
from elastic.layout.layout import Layout, spread
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec
from elastic.layout.replicas import Spots, replica_holders


def model_of(*sizes: int) -> ModelSpec:
    return ModelSpec(layers=tuple(LayerSpec.build(i, [("weight", (size,), "float32")]) for i, size in enumerate(sizes)))


@few
@given(layouts())
def test_every_unit_has_one_owner_among_the_members(layout):
    for spec, layer in zip(layout.model.layers, layout.layers, strict=True):
        owners = [(unit, i.owner) for i in layer.intervals for unit in units(i.start, i.stop)]
        assert sorted(unit for unit, _ in owners) == sorted(units(0, spec.size))
        assert {owner for _, owner in owners} <= set(layer.members)
        assert all(i.start in layout.model.cut_points(spec.index) for i in layer.intervals)


@few
@given(st.data())
def test_stages_hold_their_layers(data):
    model, workers = data.draw(models()), data.draw(worker_lists)
    stages = data.draw(stages_for(model, workers))
    layout = spread(model, stages)
    for run, members in stages:
        held = tuple(sorted(part for layer in run for part in model.parts[layer]))
        assert all(layout.members(layer) == members for layer in held)
        assert all(layout.layers_of(worker) == held for worker in members)
    assert layout.workers == tuple(workers)
    owned = [(layer, i) for worker in workers for layer, i in layout.owned(worker) if i.owner == worker]
    assert sorted((layer, i.start) for layer, i in owned) == [(layer.layer, i.start) for layer in layout.layers for i in layer.intervals]


@few
@given(models(most_layers=8, cuts=["block"]), st.integers(1, 5))
def test_totals_balance_within_two_blocks(model, workers):
    layout = spread(model, [(range(model.depth), range(workers))])
    for frozen in (False, True):
        owned = [[i for layer, i in layout.owned(worker) if (layer in model.frozen) is frozen] for worker in range(workers)]
        totals = [sum(i.elements for i in each) for each in owned]
        assert max(totals) - min(totals) <= 2 * BLOCK


def test_shares_of_a_large_layer_are_near_equal():
    layout = spread(model_of(1_000_000, 999_936), [(range(2), (3, 1, 2))])
    for layer in layout.layers:
        assert [i.owner for i in layer.intervals] == [3, 1, 2]
        sizes = [i.elements for i in layer.intervals]
        assert max(sizes) - min(sizes) <= 2 * BLOCK


def test_layers_smaller_than_a_block_take_turns():
    layout = spread(model_of(*[640] * 12), [(range(12), (0, 1, 2))])
    assert sorted(len(layout.owned(worker)) for worker in range(3)) == [4, 4, 4]


def test_whole_tensors_are_never_cut():
    tensors = [("a", (9000,), "float32"), ("b", (100,), "float32"), ("c", (9000,), "float32")]
    model = ModelSpec(layers=(LayerSpec.build(0, tensors),), cut="tensor")
    layout = spread(model, [(range(1), (0, 1))])
    assert [(i.start, i.stop) for i in layout.layers[0].intervals] == [(0, 9024), (9024, 18176)]


@few
@given(st.data())
def test_replicas_leave_worker_and_host_where_they_can(data):
    workers = data.draw(worker_lists)
    hosts = data.draw(host_maps(workers))
    for worker, replicas in replica_holders(Spots(workers, hosts)).items():
        if len(workers) == 1:
            assert replicas == ()
        else:
            (replica,) = replicas
            assert replica in workers
            assert replica != worker
            if hosts is not None and len(set(hosts.values())) > 1:
                assert hosts[replica] != hosts[worker]


@few
@given(st.integers(1, 4), st.integers(2, 4))
def test_replicas_are_dealt_evenly_when_hosts_are_equal(per_host, hosts):
    workers = range(per_host * hosts)
    found = replica_holders(Spots(workers, {worker: f"host{worker % hosts}" for worker in workers}))
    assert set(found.values()) == {(worker,) for worker in workers}


@few
@given(layouts())
def test_json_round_trip(layout):
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(range(1), (0,))], "instead of 0 to 1"),
        ([(range(2), (0,)), (range(1, 2), (1,))], "instead of 0 to 1"),
        ([(range(1), (0,)), (range(1, 2), (0, 1))], "member twice"),
        ([(range(2), ())], "at least one of each"),
        ([(range(2), (0,)), (range(2, 2), (1,))], "at least one of each"),
    ],
)
def test_impossible_stages_are_refused(stages, message):
    with pytest.raises(LayoutError, match=message):
        spread(model_of(10, 10), stages)


def test_a_hundred_layers_over_sixty_four_workers_take_little_space():
    model = model_of(*[20_000_000] * 100)
    layout = spread(model, [(range(50), range(32)), (range(50, 100), range(32, 64))])
    assert len(json.dumps(layout.to_json())) < 100_000
