"""Gradient sums: the same bits whoever computed which grain."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.engine.model import Vector
from elastic.engine.reduction import Buffers, NodeSums, Partial, VectorFold, tree_sum
from elastic.layout.regions import LayerSpec
from elastic.plan.routing import maximal_nodes

SPEC = LayerSpec.build(0, [("a", (70,), "float32"), ("b", (3, 5), "float32"), ("c", (64,), "float32")])
VECTOR = Vector(id=0, layer=0, home=0, start=0, stop=SPEC.size, parameters=SPEC.parameters)

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


def reduce(gradients: Gradients, owners: list[int], per_grain: int, buffers: Buffers) -> Partial:
    """Every worker folds its grains, and the owner adds what all of them send, the last worker's first."""
    grains = len(owners)
    total = NodeSums(grains, [(p.start, p.stop) for p in SPEC.parameters])
    folds = {}
    for worker in sorted(set(owners)):
        folds[worker] = VectorFold(VECTOR, grains, per_grain, torch.float32, buffers)
        for grain, owner in enumerate(owners):
            if owner == worker:
                for micro_batch in range(grain * per_grain, (grain + 1) * per_grain):
                    folds[worker].add(grain, gradients[micro_batch])
    for worker, fold in reversed(folds.items()):
        mine = [grain for grain, owner in enumerate(owners) if owner == worker]
        assert sorted(fold.sums.nodes) == sorted(maximal_nodes(mine, grains))
        for node, partial in reversed(fold.sums.nodes.items()):
            total.insert(node, Partial(memory=partial.memory.clone(), present=partial.present))
    result = total.total()
    for fold in folds.values():
        fold.release()
    return result


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bits_do_not_depend_on_who_computed_what(data: st.DataObject) -> None:
    grains, per_grain = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    cells = st.tuples(st.integers(0, grains * per_grain - 1), st.integers(0, 2))
    absent = set(data.draw(st.lists(cells, max_size=8)))
    gradients = make_gradients(grains * per_grain, absent, data.draw(st.integers(0, 99)))
    owners = data.draw(st.lists(st.integers(0, 3), min_size=grains, max_size=grains))
    result = reduce(gradients, owners, per_grain, Buffers())
    for bit, parameter in enumerate(SPEC.parameters):
        expected = oracle([gradient[bit] for gradient in gradients], grains)
        assert bool(result.present >> bit & 1) == (expected is not None)
        if expected is not None:
            assert torch.equal(result.memory[parameter.start : parameter.stop], expected.reshape(-1))
    used = {i for p in SPEC.parameters for i in range(p.start, p.stop)}
    gaps = [i for i in range(SPEC.size) if i not in used]
    assert result.memory[gaps].eq(0).all()


def test_a_sum_of_negative_zeros_keeps_its_sign() -> None:
    gradients: Gradients = [[torch.full(p.shape, -0.0) for p in SPEC.parameters] for _ in range(4)]
    result = reduce(gradients, [0, 0, 1, 1], 1, Buffers())
    assert torch.signbit(result.memory[0:70]).all()


def test_buffers_are_reused_and_stay_logarithmic() -> None:
    buffers = Buffers()
    gradients = make_gradients(16, set(), 0)
    for _ in range(3):
        reduce(gradients, [0] * 16, 1, buffers)
        assert buffers.bytes == 4 * SPEC.size * 4  # log2(16) subtrees wait at most, the newest grain is added to its sibling directly


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(1, 3))
def test_scalars_go_through_the_same_tree(values: list[float], per_grain: int) -> None:
    values = values * per_grain
    expected = oracle([torch.tensor(value, dtype=torch.float64) for value in values], len(values) // per_grain)
    assert expected is not None
    assert tree_sum(values, len(values) // per_grain) == expected.item()
