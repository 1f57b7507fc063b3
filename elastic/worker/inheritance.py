"""Gradient sums that a worker takes over from one that has died on its host, out of that one's segment."""

from __future__ import annotations

import torch

from elastic.engine.model import LayeredModel
from elastic.engine.reduction import Parts
from elastic.engine.salvage import Salvage
from elastic.engine.stage import LossLeaf
from elastic.errors import GateRefused
from elastic.memory.segment import MappedSegment
from elastic.memory.tensors import of_bytes
from elastic.plan.routing import Node
from elastic.recovery.offers import Contents, SumsPlace


def inherited(segment: MappedSegment, model: LayeredModel) -> Salvage:
    """Returns what a dead worker had finished of the step under way. Its memory is mapped, and copied only where it is written to.

    Raises:
        GateRefused: if the segment holds no gradient sums.
    """
    contents = Contents.read(segment, loop=False)
    place = None if contents is None else contents.sums
    if place is None:
        raise GateRefused("the segment of a dead worker holds no gradient sums any more", check="salvage")
    finished = place.finished
    return Salvage(
        step=finished.step,
        layers=finished.layers,
        grains=frozenset(finished.grains),
        summed=frozenset(finished.summed),
        sums={number: _nodes(segment, model, place, number) for number in place.nodes},
        leaves=tuple(LossLeaf(**leaf) for leaf in place.leaves),
    )


def _nodes(segment: MappedSegment, model: LayeredModel, place: SumsPlace, number: int) -> dict[Node, Parts]:
    vector = model.vectors[number]
    dtype = model.dtype(vector.home)

    def part(offset: int | None, elements: int) -> torch.Tensor | None:
        return None if offset is None else of_bytes(segment.private_bytes(offset, elements * dtype.itemsize), dtype)

    sizes = [parameter.size for parameter in vector.parameters]
    return {
        Node(level, index): [part(offset, size) for offset, size in zip(offsets, sizes, strict=True)]
        for level, index, offsets in place.nodes[number]
    }
