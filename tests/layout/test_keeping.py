"""Tests `spread(near=...)`: after losses and joins all invariants of a new layout hold, and little has moved."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import STATES, few, host_maps, models, stages_for, worker_lists

from elastic.errors import LayoutError
from elastic.layout.invariants import check
from elastic.layout.layout import Layout, spread
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec
from elastic.layout.transfer import PARAM, holdings_of, minimum_elements, transfers

OPTIMIZER = ("exp_avg", "exp_avg_sq")


def model_of(layers: int, blocks: int, tail: int = 0, cut="block") -> ModelSpec:
    size = blocks * BLOCK + tail
    return ModelSpec(layers=tuple(LayerSpec.build(i, [("weight", (size,), "float32")]) for i in range(layers)), cut=cut)


def one_stage(layout: Layout, members: list[int], hosts=None) -> Layout:
    return spread(layout.model, [(range(len(layout.layers)), members)], hosts, near=layout)


def totals(layout: Layout, *, frozen: bool | None = None) -> Counter[int]:
    """Elements that each worker owns: all, or of vectors that are `frozen` or not."""
    return _elements_by(layout, "owner", frozen)


def copies(layout: Layout) -> Counter[int]:
    """Elements that each worker keeps as a replica."""
    return _elements_by(layout, "replicas")


def _elements_by(layout: Layout, role: Literal["owner", "replicas"], frozen: bool | None = None) -> Counter[int]:
    found = Counter(dict.fromkeys(layout.workers, 0))
    for layer in (each for each in layout.layers if frozen in (None, each.layer in layout.model.frozen)):
        for interval in layer.intervals:
            for worker in (interval.owner,) if role == "owner" else interval.replicas:
                found[worker] += interval.elements
    return found


def assert_balanced(layout: Layout, stages) -> None:
    for owned in (totals(layout, frozen=frozen) for frozen in (False, True)):
        for _, members in stages:
            shares = [owned[member] for member in members]
            assert max(shares) - min(shares) <= 2 * BLOCK


def assert_short(layout: Layout) -> None:
    for layer in layout.layers:
        assert len(layer.intervals) <= 2 * len(layer.members)
        for before, after in pairwise(layer.intervals):
            assert (before.owner, before.replicas) != (after.owner, after.replicas)


@pytest.mark.slow
@few
@given(st.data())
def test_any_sequence_of_losses_and_joins_keeps_every_invariant(data):
    model = data.draw(models())
    workers = data.draw(worker_lists)
    layout = spread(model, data.draw(stages_for(model, workers)), data.draw(host_maps(workers)))
    for epoch in range(data.draw(st.integers(1, 5))):
        alive = data.draw(st.permutations(layout.workers))
        if len(alive) > 1:
            alive = alive[: data.draw(st.integers(1, len(alive)))]
        members = [*alive, *(1000 + 10 * epoch + i for i in range(data.draw(st.integers(0, 2))))]
        stages, hosts = data.draw(stages_for(model, members)), data.draw(host_maps(members))
        layout = spread(model, stages, hosts, near=layout)
        check(layout)
        assert_short(layout)
        modules = layout.layers[: model.depth]
        assert [(layer.layer, layer.members) for layer in modules] == [(i, tuple(who)) for run, who in stages for i in run]
        if model.cut == "block":
            assert_balanced(layout, stages)
        if hosts is not None and len(set(hosts.values())) > 1:
            assert all(hosts[i.owner] != hosts[i.replicas[0]] for layer in layout.layers for i in layer.intervals)


def test_whoever_lacks_almost_a_block_still_gets_one():
    """And the next one does not get it too, as if it were what rounding left over."""
    sizes = [4288, 4096, 8448, 8256]
    model = ModelSpec(layers=tuple(LayerSpec.build(i, [("weight", (size,), "float32")]) for i, size in enumerate(sizes)))
    layout = one_stage(spread(model, [(range(len(sizes)), [0])]), [0, 1000, 1001])
    assert totals(layout) == {0: 8256, 1000: 8640, 1001: 8192}


def test_whoever_gets_less_for_a_while_is_not_thought_to_be_done():
    """1000 gets no more of the first layer, and much of the others: what it lacks in between is not given to the next one too."""
    sizes = [9280, 10496, 25576, 49152]
    model = ModelSpec(layers=tuple(LayerSpec.build(i, [("weight", (size,), "float32")]) for i, size in enumerate(sizes)))
    layout = one_stage(spread(model, [(range(len(sizes)), [0])]), [0, 1000, 1001])
    assert totals(layout) == {0: 32768, 1000: 30784, 1001: 30976}


@pytest.mark.slow
@few
@given(st.data())
def test_nothing_changes_where_nothing_happened(data):
    model, workers = data.draw(models()), data.draw(worker_lists)
    stages = data.draw(stages_for(model, workers))
    layout = spread(model, stages)
    assert spread(model, stages, near=layout) == layout


@st.composite
def single_stages(draw) -> tuple[Layout, list[int]]:
    model = model_of(draw(st.integers(1, 6)), draw(st.integers(8, 60)), draw(st.sampled_from([0, 64, 1000])))
    workers = list(range(draw(st.integers(2, 8))))
    return spread(model, [(range(len(model.layers)), workers)]), workers


@few
@given(single_stages(), st.data())
def test_a_loss_moves_what_was_lost(found, data):
    layout, workers = found
    assert_little_moves(layout, workers, data.draw(st.sampled_from(workers)))


@pytest.mark.parametrize(("layers", "tail", "workers", "lost"), [(1, 64, 5, 0), (2, 1000, 4, 3)])
def test_whoever_gets_less_since_another_got_more_is_not_owed_anything(layers: int, tail: int, workers: int, lost: int) -> None:
    """Otherwise a piece is left at the end that no neighbour can take, and the layer is cut again."""
    layout = spread(model_of(layers, 50, tail), [(range(layers), range(workers))])
    assert_little_moves(layout, list(range(workers)), lost)


def assert_little_moves(layout: Layout, workers: list[int], lost: int) -> None:
    alive = [worker for worker in workers if worker != lost]
    after = one_stage(layout, alive)
    moved = minimum_elements(holdings_of(layout, OPTIMIZER, alive), after, OPTIMIZER)
    # One copy of its owned state and of its replicas must be made again, unless the one worker that is left has both already.
    must = totals(layout)[lost] + copies(layout)[lost] if len(alive) > 1 else 0
    assert must * len(OPTIMIZER) <= moved <= (must + 3 * BLOCK * len(workers)) * len(OPTIMIZER)


@few
@given(single_stages())
def test_a_join_moves_the_share_of_the_joiner(found):
    layout, workers = found
    after = one_stage(layout, [*workers, 100])
    moved = minimum_elements(holdings_of(layout, OPTIMIZER, workers), after, OPTIMIZER)
    share = sum(spec.size for spec in layout.model.layers) / (len(workers) + 1)
    assert abs(moved / len(OPTIMIZER) - share) <= 2 * BLOCK * len(workers)


@pytest.mark.parametrize(("layers", "blocks", "wide", "most"), [(1, 100, 6, 4), (6, 50, 8, 2.5), (24, 100, 8, 2.5)])
def test_later_losses_and_joins_move_little_too(layers, blocks, wide, most):
    """In units of what has to move. A fresh cut moves about half of the stage: 4 times as much with 8 workers."""
    draw = random.Random(layers)
    workers = list(range(wide))
    layout = spread(model_of(layers, blocks), [(range(layers), workers)])
    ratios = []
    for epoch in range(12):
        if len(workers) > wide or (len(workers) > 3 and draw.random() < 0.5):
            lost = draw.choice(workers)
            workers = alive = [worker for worker in workers if worker != lost]
            must = totals(layout)[lost] + copies(layout)[lost]
        else:
            alive, workers = workers, [*workers, 100 + epoch]
            must = sum(totals(layout).values()) / len(workers)
        after = one_stage(layout, workers)
        check(after)
        assert_short(after)
        assert_balanced(after, [(range(layers), workers)])
        ratios.append(minimum_elements(holdings_of(layout, OPTIMIZER[:1], alive), after, OPTIMIZER[:1]) / must)
        layout = after
    assert max(ratios) < most
    assert sum(ratios) / len(ratios) < (1 + most) / 2


def test_copies_stay_near_balance():
    layout = spread(model_of(12, 64), [(range(12), range(8))])
    workers = list(range(8))
    for epoch in range(20):
        workers = [*workers[1:], 100 + epoch]
        layout = one_stage(layout, workers)
        kept = copies(layout)
        assert max(kept.values()) <= 1.8 * sum(kept.values()) / len(kept)


def test_replicas_move_to_another_host_when_one_joins():
    layout = spread(model_of(3, 16), [(range(3), (0, 1))], {0: "a", 1: "a"})
    after = one_stage(layout, [0, 1, 2], {0: "a", 1: "a", 2: "b"})
    assert {i.replicas for layer in after.layers for i in layer.intervals if i.owner != 2} == {(2,)}


def test_transfers_come_from_survivors_only():
    layout = spread(model_of(4, 20), [(range(4), range(4))])
    after = one_stage(layout, [0, 2, 3])
    moves = transfers(holdings_of(layout, STATES, [0, 2, 3]), after, STATES)
    assert {move.source for move in moves} <= {0, 2, 3}
    assert PARAM not in {move.state for move in moves}


def test_another_model_is_refused():
    layout = spread(model_of(2, 4), [(range(2), (0, 1))])
    with pytest.raises(LayoutError, match="another model"):
        spread(model_of(2, 5), [(range(2), (0, 1))], near=layout)


@pytest.mark.parametrize("stages", [1, 2, 8])
def test_sixty_four_workers_and_forty_layers_stay_balanced(stages):
    def parts(workers):
        wide = len(workers) // stages
        cut = [0, *(len(workers) - wide * (stages - i) for i in range(1, stages)), len(workers)]
        return [(range(40 * i // stages, 40 * (i + 1) // stages), workers[cut[i] : cut[i + 1]]) for i in range(stages)]

    layout = spread(model_of(40, 4000), parts(list(range(64))))
    for workers in ([worker for worker in range(64) if worker != 13], [*range(64), 64]):
        after = spread(layout.model, parts(workers), near=layout)
        check(after)
        assert_short(after)
        assert_balanced(after, parts(workers))
