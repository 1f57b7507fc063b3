"""Sums of gradients whose bits do not depend on who computed what.

Left fold of micro-batches inside a grain, then a binary tree over the fixed grains. A node `(level, index)` covers the grains
`[index << level, (index + 1) << level)`; two siblings are added, left first, as soon as both are there, in place. Sums start by
copy, never from a zero buffer (0.0 + -0.0 would lose a sign). A parameter that got no gradient in a part is absent there: the
sum is then a copy of the other part, and a parameter absent everywhere is skipped by the optimizer, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from elastic.engine.model import Vector
from elastic.plan.routing import Node, root

Run = tuple[int, int]


@dataclass(slots=True, kw_only=True)
class Partial:
    """The sum of one subtree: memory, the runs in it that belong to one parameter each, and which of those are present."""

    memory: torch.Tensor
    present: int  # bit i: the i-th run


class NodeSums:
    """The nodes of one tree that are known here; siblings are merged into the left one's memory."""

    def __init__(self, grains: int, runs: Sequence[Run], release: Callable[[torch.Tensor], None] | None = None) -> None:
        self._root = root(grains)
        self._grains = grains
        self._runs = runs
        self._all = (1 << len(runs)) - 1
        self._release = release
        self.nodes: dict[Node, Partial] = {}

    def sibling_awaits(self, node: Node) -> Partial | None:
        """The complete left sibling, all of it present, that `node` could be added to without a buffer of its own."""
        left = self.nodes.get(Node(level=node.level, index=node.index - 1)) if node.index % 2 else None
        return left if left is not None and left.present == self._all else None

    def insert(self, node: Node, partial: Partial) -> None:
        """Adds a node and merges as far up as possible. Nodes may come in any order."""
        while node != self._root:
            left = Node(level=node.level, index=node.index & ~1)
            right = Node(level=node.level, index=node.index | 1)
            if right.index << right.level < self._grains:  # otherwise the parent is its only child
                other = self.nodes.pop(right if node == left else left, None)
                if other is None:
                    break
                partial = self._merge(partial, other) if node == left else self._merge(other, partial)
            node = Node(level=node.level + 1, index=node.index >> 1)
        self.nodes[node] = partial

    def merged_into_left(self, node: Node) -> None:
        """Says that `node` was added to its left sibling's memory directly."""
        left = Node(level=node.level, index=node.index - 1)
        self.insert(Node(level=node.level + 1, index=node.index >> 1), self.nodes.pop(left))

    def total(self) -> Partial:
        """The root; KeyError while a part is missing."""
        return self.nodes[self._root]

    def _merge(self, left: Partial, right: Partial) -> Partial:
        add_present(left, right, self._runs, self._all)
        if self._release is not None:
            self._release(right.memory)
        return left


def add_present(left: Partial, right: Partial, runs: Sequence[Run], everything: int) -> None:
    """left += right; by copy where left is absent."""
    if left.present == everything and right.present == everything:
        left.memory.add_(right.memory)
        return
    for bit, (start, stop) in enumerate(runs):
        if not right.present >> bit & 1:
            continue
        target, source = left.memory[start:stop], right.memory[start:stop]
        if left.present >> bit & 1:
            target.add_(source)
        else:
            target.copy_(source)
    left.present |= right.present


class Buffers:
    """Reuses gradient memory, so that a step touches no new pages; counts what it holds."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self.bytes = 0

    def take(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory of `size` elements, contents unspecified."""
        free = self._free.get((size, dtype))
        if free:
            return free.pop()
        self.bytes += size * dtype.itemsize
        return torch.empty(size, dtype=dtype)

    def give(self, memory: torch.Tensor) -> None:
        """Takes memory back that `take` gave."""
        self._free.setdefault((memory.numel(), memory.dtype), []).append(memory)


class VectorFold:
    """This worker's part of one gradient vector in one step: micro-batches come in, subtree sums stand in `sums.nodes`."""

    def __init__(self, vector: Vector, grains: int, micro_batches_per_grain: int, dtype: torch.dtype, buffers: Buffers) -> None:
        self._runs = [(p.start - vector.start, p.stop - vector.start) for p in vector.parameters]
        self._gaps = _gaps(self._runs, vector.size)
        self._size, self._dtype, self._buffers = vector.size, dtype, buffers
        self._per_grain = micro_batches_per_grain
        self._open: dict[int, Partial] = {}
        self._seen: dict[int, int] = {}
        self.sums = NodeSums(grains, self._runs, buffers.give)

    def add(self, grain: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """The gradients of the grain's next micro-batch, one per parameter; the micro-batches of a grain come in ascending order."""
        node = Node(level=0, index=grain)
        self._seen[grain] = self._seen.get(grain, 0) + 1
        last = self._seen[grain] == self._per_grain
        if self._per_grain == 1 and all(gradient is not None for gradient in gradients):
            waiting = self.sums.sibling_awaits(node)
            if waiting is not None:
                self._accumulate(waiting, gradients)
                self.sums.merged_into_left(node)
                return
        if grain in self._open:
            self._accumulate(self._open[grain], gradients)
        else:
            self._open[grain] = self._start(gradients)
        if last:
            self.sums.insert(node, self._open.pop(grain))

    def release(self) -> None:
        """Gives all memory back: the step is over."""
        for partial in [*self.sums.nodes.values(), *self._open.values()]:
            self._buffers.give(partial.memory)
        self.sums.nodes.clear()
        self._open.clear()

    def _start(self, gradients: Iterable[torch.Tensor | None]) -> Partial:
        memory = self._buffers.take(self._size, self._dtype)
        for start, stop in self._gaps:
            memory[start:stop].zero_()
        present = 0
        for bit, ((start, stop), gradient) in enumerate(zip(self._runs, gradients, strict=True)):
            if gradient is None:
                memory[start:stop].zero_()
            else:
                memory[start:stop].copy_(gradient.reshape(-1))
                present |= 1 << bit
        return Partial(memory=memory, present=present)

    def _accumulate(self, partial: Partial, gradients: Iterable[torch.Tensor | None]) -> None:
        for bit, ((start, stop), gradient) in enumerate(zip(self._runs, gradients, strict=True)):
            if gradient is None:
                continue
            target = partial.memory[start:stop]
            if partial.present >> bit & 1:
                target.add_(gradient.reshape(-1))
            else:
                target.copy_(gradient.reshape(-1))
        partial.present |= sum(1 << bit for bit, gradient in enumerate(gradients) if gradient is not None)


def _gaps(runs: Sequence[Run], size: int) -> list[Run]:
    edges = [0, *(position for run in runs for position in run), size]
    return [(start, stop) for start, stop in zip(edges[0::2], edges[1::2], strict=True) if start < stop]


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
        level = [sum(level[i : i + 2][1:], level[i]) for i in range(0, len(level), 2)]
    return level[0]
