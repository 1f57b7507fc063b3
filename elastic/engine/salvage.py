"""What is left of a step that was given up: the grains that a worker had finished need not be computed again.

A grain is finished at a stage when all its micro-batches have gone backward there; its gradients are in sums then, and on the last stage
its losses are known. If every stage has a worker with the sums of a grain, and that worker is still to compute the grain in the next
view, no one has to. Bits do not change: a sum is what computing it again would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elastic.engine.reduction import Parts
from elastic.engine.stage import LossLeaf
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """How a view begins with step `step`: `grains` are finished by everybody; `salvage` is what this worker has of the step."""

    step: int
    grains: frozenset[int]
    salvage: Salvage | None
