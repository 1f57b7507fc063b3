"""Tests that gradient sums have the same bits for any assignment of grains to workers."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.engine.reduction import Meter, NodeSums, Parts, SumMemory, VectorFold, tree_sum
from elastic.layout.regions import LayerSpec
from elastic.memory.segment import MappedSegment, OwnSegment, create
from elastic.memory.tensors import lasting, use_segment
from elastic.plan.routing import Node, maximal_nodes

SPEC = LayerSpec.build(0, [("a", (70,), "float32"), ("b", (3, 5), "float32"), ("c", (64,), "float32")])

Gradients = list[list[torch.Tensor | None]]


def make_gradients(micro_batches: int, absent: set[tuple[int, int]], seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    return [
        [None if (m, i) in absent else torch.randn(p.shape, generator=generator) for i, p in enumerate(SPEC.parameters)]
        for m in range(micro_batches)
    ]


def oracle(values: list[torch.Tensor | None], grains: int) -> torch.Tensor | None:
    """Fold, then pairs, then pairs of pairs; a missing part counts for nothing."""

    def add(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
        return right if left is None else left if right is None else left + right

    per_grain = len(values) // grains
    level: list[torch.Tensor | None] = []
    for grain in range(grains):
        total = None
        for value in values[grain * per_grain : (grain + 1) * per_grain]:
            total = add(total, value)
        level.append(total)
    while len(level) > 1:
        level = [add(level[i], level[i + 1]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]


def flat(gradients: list[torch.Tensor | None]) -> Parts:
    return [None if gradient is None else gradient.reshape(-1).clone() for gradient in gradients]


def memory() -> SumMemory:
    return SumMemory([(parameter.start, parameter.start + parameter.size) for parameter in SPEC.parameters], SPEC.size, torch.float32)


def reduce(gradients: Gradients, owners: list[int], per_grain: int, meter: Meter, *, lasting: bool = False) -> Parts:
    """Every worker folds its grains, and the owner adds what all of them send, the last worker's first."""
    grains = len(owners)
    total = NodeSums(grains)
    folds: dict[int, VectorFold] = {}
    own: tuple[dict[Node, Parts], dict[Node, Parts]] = {}, {}
    for worker in sorted(set(owners)):
        folds[worker] = VectorFold(grains, per_grain, 4 * SPEC.size, meter, memory() if lasting else None)
        for grain, owner in enumerate(owners):
            if owner == worker:
                for micro_batch in range(grain * per_grain, (grain + 1) * per_grain):
                    folds[worker].add(grain, flat(gradients[micro_batch]))
    for worker, fold in reversed(folds.items()):
        mine = [grain for grain, owner in enumerate(owners) if owner == worker]
        sent = fold.sums.joined()
        assert sorted(sent) == sorted(maximal_nodes(mine, grains))
        lent = worker == owners[0]
        before = {node: [None if part is None else part.clone() for part in parts] for node, parts in sent.items()}
        for node, parts in reversed(sent.items()):
            total.insert(node, parts if lent else before[node], lent=lent)
        if lent:
            own = sent, before
    result = total.total([torch.full((p.size,), torch.nan) for p in SPEC.parameters])
    for node, parts in own[0].items():  # lent tensors can be used again
        assert all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(parts, own[1][node], strict=True))
    for fold in folds.values():
        fold.release()
    assert meter.now == 0
    return result


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_fold_goes_on_with_what_another_one_had(data: st.DataObject) -> None:
    """A grain that is added again is not added twice, and one that was not complete starts anew."""
    grains, per_grain = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    micro_batches = [(m // per_grain, m) for m in range(grains * per_grain)]
    gradients = make_gradients(len(micro_batches), {(0, 1), (2, 2)}, data.draw(st.integers(0, 99)))
    first, second, whole = (VectorFold(grains, per_grain, 4 * SPEC.size, Meter()) for _ in range(3))
    for grain, m in micro_batches[: data.draw(st.integers(0, len(micro_batches)))]:
        first.add(grain, flat(gradients[m]))
    second.restore(dict(first.sums.nodes))
    skipped = data.draw(st.sets(st.sampled_from(sorted(second.sums.grains)))) if second.sums.grains else set()
    for grain, m in micro_batches:
        whole.add(grain, flat(gradients[m]))
        if grain not in skipped:
            second.add(grain, flat(gradients[m]))
    assert second.sums.joined().keys() == whole.sums.joined().keys()
    for node, parts in whole.sums.nodes.items():
        for a, b in zip(parts, second.sums.nodes[node], strict=True):
            assert a is b or (a is not None and b is not None and torch.equal(a, b))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_sums_that_others_were_told_of_are_not_written_to(data: st.DataObject) -> None:
    """The worker may be killed at any moment: whoever was told of its sums last finds them as they were then."""
    grains = data.draw(st.integers(1, 9))
    gradients = make_gradients(grains, {(0, 1), (2, 2)}, data.draw(st.integers(0, 99)))
    place = memory()
    fold = VectorFold(grains, 1, 4 * SPEC.size, Meter(), place)
    for step in range(2):
        told: dict[Node, Parts] = {}
        before: dict[Node, Parts] = {}
        for grain in data.draw(st.permutations(range(grains))):
            fold.add(grain, flat(gradients[grain]))
            if data.draw(st.booleans()):
                fold.sums.joined()
            for node, parts in told.items():
                for part, then in zip(parts, before[node], strict=True):
                    assert part is None or (then is not None and torch.equal(part, then)), (step, node)
            if data.draw(st.booleans()):
                kept = {node: parts for node, parts in fold.sums.nodes.items() if node.level > 0}
                told, before = kept, {node: [None if part is None else part.clone() for part in parts] for node, parts in kept.items()}
                place.settle()
        fold.release()
        place.settle()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bits_do_not_depend_on_who_computed_what(data: st.DataObject) -> None:
    grains, per_grain = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    cells = st.tuples(st.integers(0, grains * per_grain - 1), st.integers(0, 2))
    absent = set(data.draw(st.lists(cells, max_size=8)))
    gradients = make_gradients(grains * per_grain, absent, data.draw(st.integers(0, 99)))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=grains, max_size=grains))
    result = reduce(gradients, owners, per_grain, Meter(), lasting=data.draw(st.booleans()))
    for bit in range(len(SPEC.parameters)):
        expected = oracle([gradient[bit] for gradient in gradients], grains)
        found = result[bit]
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert torch.equal(found, expected.reshape(-1))


def test_a_sum_of_negative_zeros_keeps_its_sign() -> None:
    gradients: Gradients = [[torch.full(p.shape, -0.0) for p in SPEC.parameters] for _ in range(4)]
    for part in reduce(gradients, [0, 0, 1, 1], 1, Meter()):
        assert part is not None
        assert torch.signbit(part).all()


def test_no_more_is_held_than_the_tree_needs() -> None:
    meter = Meter()
    gradients = make_gradients(16, set(), 0)
    reduce(gradients, [0] * 16, 1, meter)
    assert meter.peak == 5 * SPEC.size * 4  # at most log2(16) subtree sums wait while the newest gradient is added


@pytest.mark.parametrize(("grains", "most"), [(16, 4), (13, 3), (8, 3), (6, 3), (2, 1), (1, 1)])
def test_memory_of_sums_is_that_of_the_waiting_subtrees_and_of_one_more(grains: int, most: int) -> None:
    """Grains are not there before they are merged, and the sums on the way up to a subtree share one memory."""
    place, taken, take = memory(), set[int](), SumMemory.take

    def counted() -> tuple[torch.Tensor, list[torch.Tensor]]:
        found = take(place)
        taken.add(found[0].data_ptr())
        return found

    place.take = counted
    fold = VectorFold(grains, 1, 4 * SPEC.size, Meter(), place)
    for grain, gradient in enumerate(make_gradients(grains, set(), 0)):
        fold.add(grain, flat(gradient))
        place.settle()
    fold.sums.joined()
    fold.sums.placed()
    assert len(taken) == most


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(1, 3))
def test_scalars_go_through_the_same_tree(values: list[float], per_grain: int) -> None:
    values = values * per_grain
    expected = oracle([torch.tensor(value, dtype=torch.float64) for value in values], len(values) // per_grain)
    assert expected is not None
    assert tree_sum(values, len(values) // per_grain) == expected.item()


@pytest.mark.parametrize("grains", [4, 6])
def test_restored_sums_stay_where_they_lie_until_the_step_ends(grains: int) -> None:
    """Other processes were told where they lie, and are told anew only after they have been added to others."""
    segment = OwnSegment(create())
    segment.keeps = True
    use_segment(segment)
    try:
        before = VectorFold(grains, 1, 4 * SPEC.size, Meter(), memory())
        for grain in (0, 1):
            before.add(grain, [torch.full((parameter.size,), float(grain + 1)) for parameter in SPEC.parameters])
        nodes = dict(before.sums.nodes)
        del before
        fold = VectorFold(grains, 1, 4 * SPEC.size, Meter(), memory())
        fold.restore(nodes)
        del nodes
        part = fold.sums.nodes[Node(1, 0)][0]
        assert part is not None
        offset = segment.offset_of(part.data_ptr())
        assert offset is not None
        there = MappedSegment(os.dup(segment._fd)).bytes_at(offset, 4 * part.numel()).view("float32")
        del part
        for grain in (2, 3):
            fold.add(grain, [torch.full((parameter.size,), 10.0) for parameter in SPEC.parameters])
        fold.sums.joined()
        fold.sums.placed()
        others = [lasting(SPEC.size, torch.float32).fill_(99.0) for _ in range(4)]
        assert (there == 3.0).all()
        fold.release()
        del others
    finally:
        use_segment(None)
