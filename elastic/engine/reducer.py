"""Reduce-scatter of gradients over links: every worker sends the subtree sums it has to each owner, the owner adds in tree order.

A vector is sent as soon as its last micro-batch has gone backward, while earlier layers still compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elastic.comm.endpoint import Endpoint
from elastic.comm.message import Kind, Tag
from elastic.engine.boundary import ALIGNMENT, as_bytes
from elastic.engine.model import LayeredModel, Vector
from elastic.engine.reduction import Buffers, NodeSums, Partial, Run, VectorFold
from elastic.layout.layout import Interval
from elastic.plan.routing import Node, maximal_nodes
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """The common run `[start, stop)` of a gradient vector and an owned interval, in elements of the home layer's vector.

    `bits[i]` is the vector's parameter that the i-th of `runs` (relative to `start`) belongs to.
    """

    vector: Vector
    interval: Interval
    start: int
    stop: int
    runs: tuple[Run, ...]
    bits: tuple[int, ...]

    @property
    def prefix(self) -> int:
        """Bytes in front of a message's elements that say which runs are present."""
        return -(-len(self.runs) // (8 * ALIGNMENT)) * ALIGNMENT

    def local(self, partial: Partial) -> Partial:
        """The part of one of the vector's subtree sums, sharing its memory."""
        memory = partial.memory[self.start - self.vector.start : self.stop - self.vector.start]
        present = sum(1 << i for i, bit in enumerate(self.bits) if partial.present >> bit & 1)
        return Partial(memory=memory, present=present)


def overlaps(vector: Vector, intervals: Sequence[Interval]) -> list[Overlap]:
    """Where a vector's gradients go: one overlap for each of its home layer's intervals that it touches."""
    found = []
    for interval in intervals:
        start, stop = max(vector.start, interval.start), min(vector.stop, interval.stop)
        if start >= stop:
            continue
        hits = [(bit, p) for bit, p in enumerate(vector.parameters) if p.start < stop and p.stop > start]
        runs = tuple((max(p.start, start) - start, min(p.stop, stop) - start) for _, p in hits)
        found.append(Overlap(vector=vector, interval=interval, start=start, stop=stop, runs=runs, bits=tuple(bit for bit, _ in hits)))
    return found


@dataclass(slots=True, kw_only=True)
class Incoming:
    """One expected message: a subtree sum of another worker, received straight into `memory`."""

    worker: int
    node: Node
    tag: Tag
    memory: torch.Tensor  # uint8: the presence prefix, then the elements


@dataclass(slots=True, kw_only=True)
class OwnedGradient:
    """The gradient sum of one owned interval; its runs, relative to the interval's start, belong to one parameter each."""

    layer: int
    interval: Interval
    partial: Partial
    runs: tuple[Run, ...]


class Reducer:
    """The gradient side of one worker in one view."""

    def __init__(self, worker: int, model: LayeredModel, view: View, network: Endpoint) -> None:
        self._worker, self._network, self._model = worker, network, model
        workload, plan, layout = view.workload, view.plan, view.layout
        self._grains = workload.grains
        self._per_grain = workload.micro_batches // workload.grains
        self.buffers = Buffers()
        self._nodes = {
            (stage, member): maximal_nodes([g for g, w in enumerate(plan.routes[stage]) if w == member], workload.grains)
            for stage, entry in enumerate(plan.stages)
            for member in entry.members
        }
        stage_of = {layer: stage for stage, entry in enumerate(plan.stages) for layer in entry.layers}
        mine = set(layout.layers_of(worker))
        self._outgoing: dict[int, list[Overlap]] = {}
        self._owned: dict[tuple[int, Interval], list[Overlap]] = {entry: [] for entry in layout.owned(worker)}
        self._incoming: dict[tuple[int, int], list[Incoming]] = {}
        for vector in model.vectors:
            stage = stage_of[vector.layer]
            found = overlaps(vector, layout.layers[vector.home].intervals)
            if vector.layer in mine and self._nodes[stage, worker]:
                self._outgoing[vector.id] = found
            for overlap in found:
                if overlap.interval.owner == worker:
                    self._owned[vector.home, overlap.interval].append(overlap)
                    self._incoming[vector.id, overlap.start] = self._expect(overlap, plan.stages[stage].members, stage)
        self._folds: dict[int, VectorFold] = {}

    @property
    def peers(self) -> set[int]:
        """The workers that this one exchanges gradients with."""
        receivers = {o.interval.owner for found in self._outgoing.values() for o in found}
        senders = {message.worker for messages in self._incoming.values() for message in messages}
        return (receivers | senders) - {self._worker}

    @property
    def received_bytes(self) -> int:
        """Memory that other workers' partial sums are received into."""
        return sum(message.memory.numel() for messages in self._incoming.values() for message in messages)

    def _expect(self, overlap: Overlap, members: Sequence[int], stage: int) -> list[Incoming]:
        itemsize = self._model.dtype(overlap.vector.home).itemsize
        size = overlap.prefix + (overlap.stop - overlap.start) * itemsize
        return [
            Incoming(worker=member, node=node, tag=_tag(0, overlap, node), memory=torch.empty(size, dtype=torch.uint8))
            for member in members
            if member != self._worker
            for node in self._nodes[stage, member]
        ]

    def begin(self, step: int) -> None:
        """Makes ready for a step: empty folds, and memory posted for what others will send."""
        self._step = step
        self._folds = {
            vector.id: VectorFold(vector, self._grains, self._per_grain, self._model.dtype(vector.home), self.buffers)
            for vector in self._model.vectors
            if vector.id in self._outgoing
        }
        for messages in self._incoming.values():
            for message in messages:
                message.tag = message.tag._replace(step=step)
                self._network.post(message.worker, message.tag, message.memory.numpy())

    def fold(self, vector: Vector, grain: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Adds one micro-batch's gradients to this worker's part."""
        self._folds[vector.id].add(grain, gradients)

    def contribute(self, vector: Vector) -> None:
        """Sends this worker's finished part of a vector to the owners; returns at once."""
        for overlap in self._outgoing[vector.id]:
            if overlap.interval.owner == self._worker:
                continue
            for node, partial in self._folds[vector.id].sums.nodes.items():
                part = overlap.local(partial)
                prefix = part.present.to_bytes(overlap.prefix, "little")
                self._network.send(overlap.interval.owner, _tag(self._step, overlap, node), prefix, as_bytes(part.memory))

    def collect(self) -> list[OwnedGradient]:
        """Waits for all parts of what this worker owns and adds them in tree order, uses of a tied parameter in layer order."""
        return [self._total(layer, interval) for layer, interval in reversed(self._owned)][::-1]

    def end(self) -> None:
        """Gives the step's memory back; every member must have received what it was sent."""
        for fold in self._folds.values():
            fold.release()
        self._folds = {}

    def _total(self, layer: int, interval: Interval) -> OwnedGradient:
        own, *uses = self._owned[layer, interval]
        total = self._sum(own)
        for use in uses:
            self._add_use(own, total, use, self._sum(use))
        return OwnedGradient(layer=layer, interval=interval, partial=total, runs=own.runs)

    def _sum(self, overlap: Overlap) -> Partial:
        sums = NodeSums(self._grains, overlap.runs)
        if overlap.vector.id in self._folds:
            for node, partial in self._folds[overlap.vector.id].sums.nodes.items():
                sums.insert(node, overlap.local(partial))
        for message in self._incoming[overlap.vector.id, overlap.start]:
            self._network.receive(message.worker, message.tag)
            present = int.from_bytes(message.memory[: overlap.prefix].numpy().tobytes(), "little")
            elements = message.memory[overlap.prefix :].view(self._model.dtype(overlap.vector.home))
            sums.insert(message.node, Partial(memory=elements, present=present))
        return sums.total()

    @staticmethod
    def _add_use(own: Overlap, total: Partial, use: Overlap, partial: Partial) -> None:
        if not partial.present:
            return
        name = use.vector.parameters[0].name
        bit = next(i for i, index in enumerate(own.bits) if own.vector.parameters[index].name == name)
        start, stop = own.runs[bit]
        target = total.memory[start:stop]
        if total.present >> bit & 1:
            target.add_(partial.memory[slice(*use.runs[0])])
        else:
            target.copy_(partial.memory[slice(*use.runs[0])])
            total.present |= 1 << bit


def _tag(step: int, overlap: Overlap, node: Node) -> Tag:
    return Tag(Kind.PARTIAL, step, overlap.vector.id, overlap.start, node.level << 24 | node.index)
