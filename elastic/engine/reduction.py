"""Sums of gradients whose bits do not depend on which worker computed which part.

Inside a grain, micro-batches are added in order (a left fold); grains are then added in a fixed binary tree. A node `(level, index)` covers
the grains `[index << level, (index + 1) << level)`. Two siblings are added, left first, as soon as both are present. A sum starts with the
gradient tensors that autograd made, and is added to in place. So nothing is copied, and no sum starts from zeros (0.0 + -0.0 would lose a
sign). A parameter without a gradient in a part is absent there (None), and the sum is the other part. The optimizer skips a parameter
absent from all parts, as in plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from elastic.memory.tensors import copy, lasting
from elastic.plan.routing import Node, root

Parts: TypeAlias = "list[torch.Tensor | None]"
"""One flat tensor per parameter, or per parameter's run in an interval; None if it is absent."""


def add(left: Parts, right: Parts) -> Parts:
    """Returns left + right, written to left's tensors where they are present. (Floating-point addition of two numbers is commutative.)"""
    both = [(one, other) for one, other in zip(left, right, strict=True) if one is not None and other is not None]
    if both:
        torch._foreach_add_([one for one, _ in both], [other for _, other in both])  # pyright: ignore[reportPrivateImportUsage]
    return [other if one is None else one for one, other in zip(left, right, strict=True)]


def add_into(left: Parts, right: Parts, target: Sequence[torch.Tensor]) -> Parts:
    """Returns left + right, written to `target`."""
    return [_sum_into(one, other, memory) for one, other, memory in zip(left, right, target, strict=True)]


def _sum_into(left: torch.Tensor | None, right: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor | None:
    if left is not None and right is not None:
        return torch.add(left, right, out=target)
    only = right if left is None else left
    if only is None:
        target.zero_()
        return None
    return target.copy_(only)


class SumMemory:
    """Memory for sums of one vector that outlives this process.

    Other processes may be told where sums lie: so what is given back is used again only after `settle`, when they have been told anew.
    """

    def __init__(self, runs: Sequence[tuple[int, int]], size: int, dtype: torch.dtype) -> None:
        """Each has `size` elements; part i lies at `runs[i]` in it."""
        self._runs, self._size, self._dtype = tuple(runs), size, dtype
        self._free: list[torch.Tensor] = []
        self._given_back: list[torch.Tensor] = []

    def take(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns memory, and the views of it for each part."""
        flat = self._free.pop() if self._free else lasting(self._size, self._dtype)
        return flat, self.views(flat)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Returns the views of taken memory for each part."""
        return [flat[start:stop] for start, stop in self._runs]

    def give_back(self, flat: torch.Tensor) -> None:
        """Takes back memory that is no longer needed."""
        self._given_back.append(flat)

    def settle(self) -> None:
        """Allows what was given back to be used again."""
        self._free += self._given_back
        self._given_back = []


class NodeSums:
    """The nodes of one tree that this worker has. `insert` does not add the root's two children; `total` adds them into given memory.

    With `memory`, the sum of two nodes is put there, and no sum there is written to.
    """

    def __init__(self, grains: int, memory: SumMemory | None = None) -> None:
        self._root = root(grains)
        self._grains = grains
        self._memory = memory
        self._places: dict[Node, torch.Tensor] = {}
        self.nodes: dict[Node, Parts] = {}
        self._lent: set[Node] = set()

    @property
    def grains(self) -> frozenset[int]:
        """The grains that the nodes cover."""
        return frozenset(grain for node in self.nodes for grain in node.grains(self._grains))

    def insert(self, node: Node, parts: Parts, *, lent: bool = False) -> None:
        """Inserts a node and merges upward as far as possible. Nodes may come in any order. The tensors of `lent` parts are not changed."""
        place: torch.Tensor | None = None
        while node != self._root:
            left = Node(level=node.level, index=node.index & ~1)
            right = Node(level=node.level, index=node.index | 1)
            if right.index << right.level < self._grains:  # otherwise the parent is its only child
                sibling = right if node == left else left
                if sibling not in self.nodes or node.parent == self._root:
                    break
                if self._memory is None:
                    parts, lent = self._merged(parts, lent, self.nodes.pop(sibling), sibling in self._lent), False
                    self._lent.discard(sibling)
                else:
                    parts, place = self._summed(self._memory, parts, place, sibling)
            node = node.parent
        self.nodes[node] = parts
        if place is not None:
            self._places[node] = place
        if lent:
            self._lent.add(node)

    def _summed(self, memory: SumMemory, parts: Parts, place: torch.Tensor | None, sibling: Node) -> tuple[Parts, torch.Tensor]:
        """Returns the sum of parts and of a node that is here, and where it lies: in `place`, where the parts lie and nobody was told of
        them, or in other memory if that is None."""
        flat, views = memory.take() if place is None else (place, memory.views(place))
        found = add_into(parts, self.nodes.pop(sibling), views)
        if (old := self._places.pop(sibling, None)) is not None:
            memory.give_back(old)
        return found, flat

    @staticmethod
    def _merged(one: Parts, one_lent: bool, other: Parts, other_lent: bool) -> Parts:
        """Returns the sum of two nodes, in memory that is not lent."""
        target, added, added_lent = (other, one, one_lent) if one_lent else (one, other, other_lent)
        if one_lent and other_lent:
            target = [None if part is None else copy(part) for part in target]
        if added_lent:
            added = [copy(part) if part is not None and mine is None else part for part, mine in zip(added, target, strict=True)]
        return add(target, added)

    def joined(self) -> dict[Node, Parts]:
        """Adds the root's children if both are here, and returns the nodes: the fewest that cover the same grains. A worker sends these."""
        nodes = sorted(self.nodes)
        if len(nodes) == 2 and all(node.parent == self._root for node in nodes):
            if self._memory is not None:
                old = self._places.pop(nodes[0], None)
                parts, place = self._summed(self._memory, self.nodes.pop(nodes[0]), None, nodes[1])
                if old is not None:
                    self._memory.give_back(old)
                self.nodes, self._places = {self._root: parts}, {self._root: place}
                return self.nodes
            self.nodes = {self._root: add(self.nodes[nodes[0]], self.nodes[nodes[1]])}
        return self.nodes

    def placed(self) -> dict[Node, torch.Tensor]:
        """Returns the memory in which each node lies. Those that lie elsewhere are copied to such memory first."""
        assert self._memory is not None  # only sums with memory are placed
        for node, parts in self.nodes.items():
            if node not in self._places:
                self._places[node], views = self._memory.take()
                self.nodes[node] = [None if part is None else view.copy_(part) for part, view in zip(parts, views, strict=True)]
        return {node: self._places[node] for node in self.nodes}

    def release(self) -> None:
        """Drops all nodes."""
        self.nodes = {}
        if self._memory is not None:
            for place in self._places.values():
                self._memory.give_back(place)
        self._places = {}

    def total(self, target: Sequence[torch.Tensor]) -> Parts:
        """Returns the root's sum, written to `target`. Raises KeyError while a part is missing."""
        if self._root in self.nodes:
            return add_into(self.nodes[self._root], [None] * len(target), target)
        level = self._root.level - 1
        return add_into(self.nodes[Node(level=level, index=0)], self.nodes[Node(level=level, index=1)], target)


class Meter:
    """Counts the bytes held now and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def change(self, by: int) -> None:
        """Adds `by` bytes; below 0 if memory was released."""
        self.now += by
        self.peak = max(self.peak, self.now)


class VectorFold:
    """This worker's part of one gradient vector in one step: takes gradients of micro-batches, and keeps sums of subtrees in `sums`."""

    def __init__(self, grains: int, micro_batches_per_grain: int, vector_bytes: int, meter: Meter, memory: SumMemory | None = None) -> None:
        self._per_grain = micro_batches_per_grain
        self._bytes, self._meter = vector_bytes, meter
        self._open: dict[int, Parts] = {}
        self._seen: dict[int, int] = {}
        self._counted = 0
        self.salvaged: frozenset[int] = frozenset()
        self._restored: list[Parts] = []
        self.sums = NodeSums(grains, memory)

    def restore(self, nodes: Mapping[Node, Parts]) -> None:
        """Starts with sums salvaged from the aborted step. `add` then ignores gradients of the grains they cover.

        Their memory is kept to the end of the step: others may still be told where they lie when they are in the sum of more grains.
        """
        for node, parts in nodes.items():
            self.sums.insert(node, parts)
        self._restored = list(nodes.values())
        self.salvaged = self.sums.grains
        self._count(len(self.sums.nodes))

    def add(self, grain: int, gradients: Parts) -> None:
        """Adds the flat gradients of the grain's next micro-batch, in ascending order: one tensor per parameter. Keeps the tensors."""
        if grain in self.salvaged:
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
        """Releases all memory at the end of the step."""
        self.sums.release()
        self._open, self._restored = {}, []
        self._count(0)

    def _count(self, copies: int) -> None:
        self._meter.change((copies - self._counted) * self._bytes)
        self._counted = copies


def tree_sum(values: Sequence[float], grains: int) -> float:
    """Returns the sum, by the same fold and tree, of one float per micro-batch (ascending), such as the loss."""
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
