"""Reduce-scatter of gradients over links: every worker sends the subtree sums it has to each owner, the owner adds in tree order.

A vector is sent as soon as its last micro-batch has gone backward, while earlier layers still compute. Owners of the same host are told
where the sums lie when the last one is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic.comm.message import MessageKind, Tag
from elastic.engine.bundle import Bundle, tag
from elastic.engine.model import LayeredModel, Vector
from elastic.engine.reduction import Meter, NodeSums, Parts, SumMemory, VectorFold
from elastic.engine.shared import REFERENCE_BYTES, SharedMemory
from elastic.engine.tensor_links import Sink, TensorLinks
from elastic.layout.layout import Interval
from elastic.layout.runs import shared
from elastic.memory.raw import ALIGNMENT_BYTES
from elastic.memory.staging import Part
from elastic.memory.tensors import bytes_of, empty, outlives, retyped, zeros
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
    runs: tuple[tuple[int, int], ...]
    bits: tuple[int, ...]

    @property
    def prefix(self) -> int:
        """Bytes in front of a message's elements that say which runs are present."""
        return -(-len(self.runs) // (8 * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The runs of an interval's flat memory."""
        return [memory[start:stop] for start, stop in self.runs]

    def local(self, parts: Parts) -> Parts:
        """The runs of one of the vector's subtree sums, sharing its memory."""
        found: Parts = []
        for bit, (start, stop) in zip(self.bits, self.runs, strict=True):
            part, offset = parts[bit], self.start - self.vector.parameters[bit].start
            found.append(None if part is None else part[start + offset : stop + offset])
        return found

    def present(self, parts: Parts) -> bytes:
        """The beginning of a message: which runs are present."""
        return sum(1 << bit for bit, part in enumerate(parts) if part is not None).to_bytes(self.prefix, "little")

    def encode(self, parts: Parts, itemsize: int) -> list[Part]:
        """One message: which runs are present, then all elements from `start` to `stop`, zero where there is nothing."""
        sent: list[Part] = [self.present(parts)]
        position = 0
        for part, (start, stop) in zip(parts, self.runs, strict=True):
            if part is not None:
                sent += [bytes((start - position) * itemsize), part]
                position = stop
        return [*sent, bytes((self.stop - self.start - position) * itemsize)]

    def decode(self, message: Sink, dtype: torch.dtype) -> Parts:
        """The inverse of `encode`: takes the message, and shares its memory (uint8)."""
        memory = message.take()
        return self.parts(message.head(self.prefix), retyped(memory[self.prefix :], dtype))

    def parts(self, head: np.ndarray, memory: torch.Tensor) -> Parts:
        """Returns the runs in `memory` that the beginning of a message says are present."""
        present = int.from_bytes(head.tobytes(), "little")
        return [view if present >> bit & 1 else None for bit, view in enumerate(self.views(memory))]


def overlaps(vector: Vector, intervals: Sequence[Interval]) -> list[Overlap]:
    """Where a vector's gradients go: one overlap for each of its home layer's intervals that it touches."""
    found = []
    for interval in intervals:
        both = shared((vector.start, vector.stop), interval.run)
        if both is None:
            continue
        start, stop = both
        hits = [(bit, p) for bit, p in enumerate(vector.parameters) if p.start < stop and p.stop > start]
        runs = tuple((max(p.start, start) - start, min(p.stop, stop) - start) for _, p in hits)
        found.append(Overlap(vector=vector, interval=interval, start=start, stop=stop, runs=runs, bits=tuple(bit for bit, _ in hits)))
    return found


@dataclass(slots=True, kw_only=True)
class Incoming:
    """One expected subtree sum of another worker: a message received straight into `sink`, or from a worker of this host a `part` of its
    bundle, by number."""

    worker: int
    node: Node
    tag: Tag
    sink: Sink | None  # uint8: the presence prefix, then the elements
    part: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedGradient:
    """The gradient sum of one owned interval: flat memory, zero where there is nothing, and its runs, None where absent."""

    layer: int
    interval: Interval
    memory: torch.Tensor
    parts: Parts


class Reducer:
    """The gradient side of one worker in one view."""

    def __init__(self, worker: int, model: LayeredModel, view: View, links: TensorLinks, shared: SharedMemory) -> None:
        self._worker, self._links, self._model, self._shared = worker, links, model, shared
        self._network = links.network
        workload, plan, layout = view.workload, view.plan, view.layout
        self._grains = workload.grains
        self._per_grain = workload.micro_batches // workload.grains
        self.meter = Meter()
        self._nodes = {
            (stage, member): maximal_nodes([g for g, w in enumerate(plan.routes[stage]) if w == member], workload.grains)
            for stage, entry in enumerate(plan.stages)
            for member in entry.members
        }
        stage_of = {layer: stage for stage, entry in enumerate(plan.stages) for layer in entry.layers}
        mine = set(layout.layers_of(worker))
        self._outgoing: dict[int, list[Overlap]] = {}
        self._owned: dict[tuple[int, Interval], list[Overlap]] = {
            (layer, interval): [] for layer, interval in layout.owned(worker) if layer not in model.spec.frozen
        }
        self._incoming: dict[tuple[int, int], list[Incoming]] = {}
        self._totals: dict[tuple[int, int], torch.Tensor] = {}
        self._memory: dict[int, SumMemory] = {}
        self._peers: set[int] = set()
        for vector in model.vectors:
            stage = stage_of[vector.layer]
            found = overlaps(vector, layout.layers[vector.home].intervals)
            if vector.layer in mine and self._nodes[stage, worker]:
                self._outgoing[vector.id] = found
            if vector.layer in mine:
                self._peers |= {overlap.interval.owner for overlap in found}
            for overlap in found:
                if overlap.interval.owner == worker:
                    self._peers.update(plan.stages[stage].members)
                    self._owned[vector.home, overlap.interval].append(overlap)
                    self._incoming[vector.id, overlap.start] = self._expect(overlap, plan.stages[stage].members, stage)
                    self._totals[vector.id, overlap.start] = zeros(overlap.stop - overlap.start, model.dtype(vector.home))
        self._bundles = self._bundled()
        self._told: dict[int, list[tuple[tuple[int, int, Node], bytes]]] = {}  # what is not sent yet, by owner
        self._untold: set[int] = set()  # the vectors that have not been contributed
        self._folds: dict[int, VectorFold] = {}
        self._past: dict[int, VectorFold] = {}  # of the step before
        if outlives():
            self._memory = {
                vector.id: SumMemory(
                    [(each.start - vector.start, each.start - vector.start + each.size) for each in vector.parameters],
                    vector.size,
                    model.dtype(vector.home),
                )
                for vector in model.vectors
                if vector.id in self._outgoing
            }

    @property
    def peers(self) -> set[int]:
        """The workers that this one exchanges gradients with, on whatever routes."""
        return self._peers - {self._worker}

    @property
    def total_bytes(self) -> int:
        """Memory of the sums of what this worker owns."""
        return sum(memory.numel() * memory.element_size() for memory in self._totals.values())

    @property
    def received_bytes(self) -> int:
        """Memory that other workers' partial sums are received into."""
        messages = (message for messages in self._incoming.values() for message in messages)
        alone = sum(message.sink.size for message in messages if message.sink is not None)
        return alone + sum(bundle.size for bundle in self._bundles.values())

    def _bundled(self) -> dict[int, Bundle]:
        """Numbers the parts of the bundles that workers of this host send here, in the order of `_told`, and returns these by sender."""
        sizes: dict[int, list[int]] = {}
        overlaps = {(overlap.vector.id, overlap.start): overlap for found in self._owned.values() for overlap in found}
        for place in sorted(self._incoming):
            for message in sorted(self._incoming[place], key=lambda message: message.node):
                if message.sink is None:
                    known = sizes.setdefault(message.worker, [])
                    message.part = len(known)
                    known.append(overlaps[place].prefix + REFERENCE_BYTES)
        return {worker: Bundle(MessageKind.PARTIAL, worker, known) for worker, known in sizes.items()}

    def _expect(self, overlap: Overlap, members: Sequence[int], stage: int) -> list[Incoming]:
        size = overlap.prefix + (overlap.stop - overlap.start) * self._model.dtype(overlap.vector.home).itemsize
        return [
            Incoming(
                worker=member,
                node=node,
                tag=_tag(0, overlap, node),
                sink=None if member in self._shared else self._links.sink(empty(size, torch.uint8)),
            )
            for member in members
            if member != self._worker
            for node in self._nodes[stage, member]
        ]

    def begin(self, step: int) -> None:
        """Makes ready for a step: empty folds, and memory posted for what others will send."""
        self._step = step
        self._folds = {
            vector.id: VectorFold(
                self._grains,
                self._per_grain,
                vector.size * self._model.dtype(vector.home).itemsize,
                self.meter,
                self._memory.get(vector.id),
            )
            for vector in self._model.vectors
            if vector.id in self._outgoing
        }
        self._told, self._untold = {}, {*self._outgoing}
        for bundle in self._bundles.values():
            bundle.post(self._network, step)
        for messages in self._incoming.values():
            for message in messages:
                if message.sink is not None:
                    message.tag = message.tag._replace(step=step)
                    message.sink.post(message.worker, message.tag)

    def restore(self, sums: Mapping[int, Mapping[Node, Parts]]) -> None:
        """Begins with sums that are known already, by vector id."""
        for number, nodes in sums.items():
            if number in self._folds:
                self._folds[number].restore(nodes)

    def sums(self) -> dict[int, dict[Node, Parts]]:
        """The subtree sums of this worker's part as they are now, by vector id."""
        return {number: dict(fold.sums.nodes) for number, fold in self._folds.items()}

    def has_sum(self, vector: Vector, grain: int) -> bool:
        """Whether a restored sum of this vector covers the grain."""
        return grain in self._folds[vector.id].salvaged

    def settle(self) -> None:
        """Allows memory of sums that are no longer needed to be used again: nobody is told of them any more."""
        for memory in self._memory.values():
            memory.settle()

    def fold(self, vector: Vector, grain: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Adds one micro-batch's gradients to this worker's part; the tensors are kept and written to."""
        self._folds[vector.id].add(grain, [None if gradient is None else gradient.reshape(-1) for gradient in gradients])

    def contribute(self, vector: Vector) -> None:
        """Sends this worker's finished part of a vector to the owners; returns at once."""
        overlaps = [overlap for overlap in self._outgoing[vector.id] if overlap.interval.owner != self._worker]
        if overlaps:
            self._contribute(vector, overlaps)
        elif self._memory:  # nobody reads this sum elsewhere, but it has to be there if this worker dies
            self._folds[vector.id].sums.placed()
        self._untold.discard(vector.id)
        if not self._untold:
            told, self._told = self._told, {}
            for owner, parts in told.items():
                self._network.send(owner, tag(MessageKind.PARTIAL, self._step), b"".join(part for _, part in sorted(parts)))

    def _contribute(self, vector: Vector, overlaps: Sequence[Overlap]) -> None:
        itemsize = self._model.dtype(vector.home).itemsize
        sums = self._folds[vector.id].sums
        nodes = sums.joined()
        places = sums.placed() if any(overlap.interval.owner in self._shared for overlap in overlaps) else {}
        for node, parts in nodes.items():
            for overlap in overlaps:
                owner, local = overlap.interval.owner, overlap.local(parts)
                if owner in self._shared:
                    start = overlap.start - vector.start
                    part = overlap.present(local) + self._shared.reference(places[node][start : start + 1])
                    self._told.setdefault(owner, []).append(((vector.id, overlap.start, node), part))
                else:
                    self._links.send(owner, _tag(self._step, overlap, node), *overlap.encode(local, itemsize))

    def collect(self) -> list[OwnedGradient]:
        """Waits for all parts of what this worker owns and adds them in tree order, uses of a tied parameter in layer order."""
        return [self._total(layer, interval) for layer, interval in reversed(self._owned)][::-1]

    def end(self) -> None:
        """Lets go of the step's gradients, and of those of the step before."""
        for fold in self._folds.values():
            fold.release()
        self._folds = {}
        self.forget_past()

    def retire(self) -> None:
        """Ends a step, and keeps its sums until `forget_past`, which is called before the next step adds gradients."""
        self._past, self._folds = self._folds, {}

    def forget_past(self) -> None:
        """Lets go of the sums of the step before."""
        for fold in self._past.values():
            fold.release()
        self._past = {}
        self.settle()

    def release(self) -> None:
        """Lets go of all memory; nothing else may be called afterwards."""
        self._memory, self._totals, self._incoming, self._bundles = {}, {}, {}, {}

    def _total(self, layer: int, interval: Interval) -> OwnedGradient:
        own, *uses = self._owned[layer, interval]
        parts = self._sum(own)
        for use in uses:
            self._add_use(own, parts, use, self._sum(use))
        return OwnedGradient(layer=layer, interval=interval, memory=self._totals[own.vector.id, own.start], parts=parts)

    def _sum(self, overlap: Overlap) -> Parts:
        sums = NodeSums(self._grains)
        if overlap.vector.id in self._folds:
            for node, parts in self._folds[overlap.vector.id].sums.nodes.items():
                sums.insert(node, overlap.local(parts), lent=True)
        for message in self._incoming[overlap.vector.id, overlap.start]:
            dtype = self._model.dtype(overlap.vector.home)
            if message.sink is not None:
                sums.insert(message.node, overlap.decode(message.sink, dtype))
            elif message.part is not None:
                received = self._bundles[message.worker].part(self._network, message.part)
                head, reference = bytes_of(received[: overlap.prefix]), bytes_of(received[overlap.prefix :])
                memory = self._shared.tensor(message.worker, reference, overlap.stop - overlap.start, dtype)
                sums.insert(message.node, overlap.parts(head, memory), lent=True)
        return sums.total(overlap.views(self._totals[overlap.vector.id, overlap.start]))

    def _add_use(self, own: Overlap, total: Parts, use: Overlap, parts: Parts) -> None:
        (part,) = parts
        if part is None:
            return
        name = use.vector.parameters[0].name
        bit = next(i for i, index in enumerate(own.bits) if own.vector.parameters[index].name == name)
        before = total[bit]
        if before is None:
            target = own.views(self._totals[own.vector.id, own.start])[bit]
            total[bit] = target.copy_(part)
        else:
            before.add_(part)


def _tag(step: int, overlap: Overlap, node: Node) -> Tag:
    return Tag(MessageKind.PARTIAL, step, overlap.vector.id, overlap.start, node.level << 24 | node.index)
