"""Tests that good layouts pass, and that each kind of damage is refused with the name of the broken invariant."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from layout_strategies import few, layouts

from elastic.errors import LayoutError
from elastic.layout.invariants import check
from elastic.layout.layout import Interval, Layout, spread
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec

MODEL = ModelSpec(layers=tuple(LayerSpec.build(i, [("a", (9 * BLOCK + 100,), "float32"), ("b", (7,), "float32")]) for i in range(4)))
GOOD = spread(MODEL, [(range(2), (0, 1)), (range(2, 4), (2, 3))])


@few
@given(layouts())
def test_what_spread_makes_passes(layout):
    check(layout)


def with_layer(position: int = 1, **changes) -> Layout:
    layers = list(GOOD.layers)
    layers[position] = replace(layers[position], **changes)
    return replace(GOOD, layers=tuple(layers))


def with_interval(number: int, **changes) -> Layout:
    intervals = list(GOOD.layers[1].intervals)
    intervals[number] = replace(intervals[number], **changes)
    return with_layer(intervals=tuple(intervals))


FIRST, LAST = GOOD.layers[1].intervals
SIZE = MODEL.layers[1].size

DAMAGE = {
    "hole at the front": (with_interval(0, start=BLOCK), rf"coverage: layer 1, run \[0, {BLOCK}\)"),
    "hole in the middle": (with_interval(0, stop=BLOCK), rf"coverage: layer 1, run \[{BLOCK}, {FIRST.stop}\)"),
    "last interval lost": (with_layer(intervals=(FIRST,)), rf"coverage: layer 1, run \[{LAST.start}, {SIZE}\)"),
    "all intervals lost": (with_layer(intervals=()), rf"coverage: layer 1, run \[0, {SIZE}\)"),
    "beyond the end": (with_interval(1, stop=SIZE + 64), rf"coverage: layer 1, run \[{SIZE}, {SIZE + 64}\)"),
    "overlap": (with_interval(0, stop=FIRST.stop + BLOCK), rf"single owner: layer 1, run \[{LAST.start}, {LAST.start + BLOCK}\)"),
    "interval twice": (with_layer(intervals=(FIRST, FIRST, LAST)), rf"single owner: layer 1, run \[0, {FIRST.stop}\)"),
    "out of order": (with_layer(intervals=(LAST, FIRST)), rf"coverage: layer 1, run \[0, {LAST.start}\)"),
    "empty interval": (
        with_layer(intervals=(Interval(start=0, stop=0, owner=0, replicas=(1,)), FIRST, LAST)),
        r"single owner: layer 1, run \[0, 0\): the interval is empty",
    ),
    "owner of another stage": (with_interval(0, owner=2), "ownership: layer 1.*owner 2"),
    "unknown owner": (with_interval(0, owner=77), "ownership: layer 1.*owner 77"),
    "replica is the owner": (with_interval(1, replicas=(LAST.owner,)), f"replication: layer 1.*worker {LAST.owner} is both"),
    "replica is unknown": (with_interval(1, replicas=(77,)), "replication: layer 1.*replica 77"),
    "replica is missing": (with_interval(1, replicas=()), "replication: layer 1.*no replica"),
    "no members": (with_layer(members=()), "members: layer 1"),
    "member twice": (with_layer(members=(0, 1, 1)), "members: layer 1"),
    "layers swapped": (replace(GOOD, layers=(GOOD.layers[1], GOOD.layers[0], *GOOD.layers[2:])), "order: layer 1"),
    "layer lost": (replace(GOOD, layers=GOOD.layers[:3]), "order: layer 3: the layout has 3 layers and the model 4"),
    "stages overlap": (with_layer(2, members=(2, 3, 1)), "order: layer 2: workers \\[1\\]"),
    "other members": (with_layer(members=(4, 5)), "ownership: layer 1.*owner 0 is not"),
    "worker comes back": (with_layer(3, members=(0, 1)), "order: layer 3: workers \\[0, 1\\]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(name):
    layout, message = DAMAGE[name]
    with pytest.raises(LayoutError, match=message):
        check(layout)


def test_a_cut_inside_a_block_is_refused():
    shifted = (replace(FIRST, stop=FIRST.stop + 64), replace(LAST, start=LAST.start + 64))
    with pytest.raises(LayoutError, match=r"alignment: layer 1.*block"):
        check(with_layer(intervals=shifted))


def test_a_cut_inside_a_tensor_is_refused():
    model = replace(MODEL, cut="tensor")
    check(spread(model, [(range(4), (0, 1))]))
    with pytest.raises(LayoutError, match=r"alignment: layer 0.*tensor"):
        check(replace(GOOD, model=model))


def test_a_single_worker_needs_no_replica():
    alone = spread(MODEL, [(range(4), (5,))])
    assert all(i.replicas == () for layer in alone.layers for i in layer.intervals)
    check(alone)
