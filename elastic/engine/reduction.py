"""Sums of gradients whose bits do not depend on who computed what.

Left fold of micro-batches inside a grain, then a binary tree over the fixed grains. A node `(level, index)` covers the grains
`[index << level, (index + 1) << level)`; two siblings are added, left first, as soon as both are there. Sums begin with autograd's own
gradient tensors, which are kept and added to in place: nothing is copied, and no sum starts from a zero buffer (0.0 + -0.0 would lose
a sign). A parameter that got no gradient in a part is absent there (None): the sum is then the other part, and a parameter absent
everywhere is skipped by the optimizer, as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from elastic.memory.tensors import copy
from elastic.plan.routing import Node, root

Parts: TypeAlias = "list[torch.Tensor | None]"
"""One flat tensor per parameter, or per parameter's run in an interval; None where it is absent."""


def add(left: Parts, right: Parts) -> Parts:
    """left + right, in left's memory where it has any. (Addition is commutative, to the bit.)"""
    both = [(one, other) for one, other in zip(left, right, strict=True) if one is not None and other is not None]
    if both:
        torch._foreach_add_([one for one, _ in both], [other for _, other in both])  # pyright: ignore[reportPrivateImportUsage]
    return [other if one is None else one for one, other in zip(left, right, strict=True)]


def add_into(left: Parts, right: Parts, target: Sequence[torch.Tensor]) -> Parts:
    """left + right, written to `target`."""
    return [_sum_into(one, other, memory) for one, other, memory in zip(left, right, target, strict=True)]


def _sum_into(left: torch.Tensor | None, right: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor | None:
    if left is not None and right is not None:
        return torch.add(left, right, out=target)
    only = right if left is None else left
    if only is None:
        target.zero_()
        return None
    return target.copy_(only)


class NodeSums:
    """The nodes of one tree that are known here. The two children of the root are left alone: `total` joins them into given memory."""

    def __init__(self, grains: int) -> None:
        self._root = root(grains)
        self._grains = grains
        self.nodes: dict[Node, Parts] = {}
        self._lent: set[Node] = set()

    @property
    def grains(self) -> frozenset[int]:
        """The grains that the nodes cover."""
        return frozenset(grain for node in self.nodes for grain in node.grains(self._grains))

    def insert(self, node: Node, parts: Parts, *, lent: bool = False) -> None:
        """Adds a node and merges as far up as possible. Nodes may come in any order. What is `lent` is not written to."""
        while node != self._root:
            left = Node(level=node.level, index=node.index & ~1)
            right = Node(level=node.level, index=node.index | 1)
            if right.index << right.level < self._grains:  # otherwise the parent is its only child
                sibling = right if node == left else left
                if sibling not in self.nodes or node.parent == self._root:
                    break
                parts, lent = self._merged(parts, lent, self.nodes.pop(sibling), sibling in self._lent), False
                self._lent.discard(sibling)
            node = node.parent
        self.nodes[node] = parts
        if lent:
            self._lent.add(node)

    @staticmethod
    def _merged(one: Parts, one_lent: bool, other: Parts, other_lent: bool) -> Parts:
        """Their sum, in memory that is not lent."""
        target, added, added_lent = (other, one, one_lent) if one_lent else (one, other, other_lent)
        if one_lent and other_lent:
            target = [None if part is None else copy(part) for part in target]
        if added_lent:
            added = [copy(part) if part is not None and mine is None else part for part, mine in zip(added, target, strict=True)]
        return add(target, added)

    def joined(self) -> dict[Node, Parts]:
        """The fewest nodes that say the same: what one worker sends."""
        nodes = sorted(self.nodes)
        if len(nodes) == 2 and all(node.parent == self._root for node in nodes):
            self.nodes = {self._root: add(self.nodes[nodes[0]], self.nodes[nodes[1]])}
        return self.nodes

    def total(self, target: Sequence[torch.Tensor]) -> Parts:
        """The root's sum, written to `target`; KeyError while a part is missing."""
        if self._root in self.nodes:
            return add_into(self.nodes[self._root], [None] * len(target), target)
        level = self._root.level - 1
        return add_into(self.nodes[Node(level=level, index=0)], self.nodes[Node(level=level, index=1)], target)


class Meter:
    """Bytes held now and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def change(self, by: int) -> None:
        """Counts bytes that were taken (above 0) or given back."""
        self.now += by
        self.peak = max(self.peak, self.now)


class VectorFold:
    """This worker's part of one gradient vector in one step: micro-batches come in, subtree sums stand in `sums`."""

    def __init__(self, grains: int, micro_batches_per_grain: int, vector_bytes: int, meter: Meter) -> None:
        self._per_grain = micro_batches_per_grain
        self._bytes, self._meter = vector_bytes, meter
        self._open: dict[int, Parts] = {}
        self._seen: dict[int, int] = {}
        self._counted = 0
        self._salvaged: frozenset[int] = frozenset()
        self.sums = NodeSums(grains)

    def restore(self, nodes: Mapping[Node, Parts]) -> None:
        """Begins with what is known of the step already; gradients of those grains that are added again are left out."""
        for node, parts in nodes.items():
            self.sums.insert(node, parts)
        self._salvaged = self.sums.grains
        self._count(len(self.sums.nodes))

    def add(self, grain: int, gradients: Parts) -> None:
        """The flat gradients of the grain's next micro-batch, one per parameter, kept; a grain's micro-batches come in ascending order."""
        if grain in self._salvaged:
            return
        self._count(1 + len(self.sums.nodes) + len(self._open))
        self._seen[grain] = self._seen.get(grain, 0) + 1
        total = add(self._open.pop(grain), gradients) if grain in self._open else gradients
        if self._seen[grain] == self._per_grain:
            self.sums.insert(Node(level=0, index=grain), total)
        else:
            self._open[grain] = total
        self._count(len(self.sums.nodes) + len(self._open))

    def release(self) -> None:
        """Lets go of everything: the step is over."""
        self.sums.nodes = {}
        self._open = {}
        self._count(0)

    def _count(self, copies: int) -> None:
        self._meter.change((copies - self._counted) * self._bytes)
        self._counted = copies


def tree_sum(values: Sequence[float], grains: int) -> float:
    """The same fold and tree for one float per micro-batch (ascending), such as the loss."""
    per_grain = len(values) // grains
    level = []
    for grain in range(grains):
        total = values[grain * per_grain]
        for value in values[grain * per_grain + 1 : (grain + 1) * per_grain]:
            total += value
        level.append(total)
    while len(level) > 1:
        level = [level[i] + level[i + 1] if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    return level[0]
