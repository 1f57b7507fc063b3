"""What is left of a step that was given up: the grains that a worker had finished need not be computed again.

A grain is finished at a stage when all its micro-batches have gone backward there; its gradients are in sums then, and on the last stage
its losses are known. If every stage has a worker with the sums of a grain, and that worker is still to compute the grain in the next
view, no one has to. Bits do not change: a sum is what computing it again would give.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from elastic.engine.reduction import Parts
from elastic.engine.stage import LossLeaf
from elastic.engine.statistics import Records
from elastic.plan.routing import Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """One worker's part of step `step`, of `layers`: gradient sums by vector id, and losses.

    `grains` are finished; `summed` are all that some sum covers, which is of use only where all of them are to be computed here.
    """

    step: int
    layers: range
    grains: frozenset[int]
    summed: frozenset[int]
    sums: Mapping[int, Mapping[Node, Parts]]
    leaves: tuple[LossLeaf, ...]
    records: Records = field(default_factory=dict)


def kept(salvage: Salvage, routed: Mapping[int, Collection[int]], *, last: bool) -> Salvage:
    """What is of use to a worker that computes the `routed` grains (with their micro-batches), at the `last` stage or another.

    A worker that has left the last stage has losses that the new last stage computes again, and where no layer of a stage has a gradient
    nothing else says that a grain is another worker's now: each loss is to be told once.
    """
    grains = salvage.grains.intersection(routed)
    wanted = {micro_batch for grain in grains for micro_batch in routed[grain]} if last else set()
    return replace(salvage, grains=grains, leaves=tuple(leaf for leaf in salvage.leaves if leaf.micro_batch in wanted))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """How a view begins with step `step`: `grains` are finished by everybody; `salvage` is what this worker has of the step."""

    step: int
    grains: frozenset[int]
    salvage: Salvage | None
