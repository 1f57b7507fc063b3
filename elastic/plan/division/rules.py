"""The interface of a cost model: seconds of a stage, a transfer, a synchronisation and an update, and bytes of a stage in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elastic.plan.division.shapes import Makeup, Pool, Shape

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    """How often a stage is charged, per micro-batch, for sending its activations on and its gradients back.

    `first` is for the first stage, indexed by the number of stages (its last entry is used for all larger ones); `middle` for both
    directions of a stage in between; `last` for the last stage. A single stage sends nothing.
    """

    first: tuple[float, ...]
    middle: float
    last: float

    def of_first(self, depth: int) -> float:
        """Returns the charge for the first of `depth` stages."""
        return self.first[min(depth, len(self.first)) - 1]

    def seconds(self, number: int, depth: int, onward: float, back: float) -> float:
        """Returns the seconds charged to stage `number` of `depth`, which sends activations in `onward` s and gradients in `back` s."""
        if number == depth - 1:
            return self.last * back
        return self.middle * (onward + back) if number else self.of_first(depth) * onward


def pipeline_seconds(stage_s: Sequence[float], micro_batches: int) -> float:
    """Returns the seconds of a 1F1B pipeline for M micro-batches: `(M - 1) max + sum` over the stages' seconds for one."""
    return (micro_batches - 1) * max(stage_s) + sum(stage_s)


class Footprint(Protocol):
    """Bytes on one device by first layer and one past the last, shape (layers + 1, layers + 1)."""

    @property
    def fixed(self) -> Floats: ...

    @property
    def in_flight(self) -> Floats:
        """Bytes that each micro-batch in flight adds."""
        ...

    @property
    def capacity(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """A `Footprint` of plain arrays."""

    fixed: Floats
    in_flight: Floats
    capacity: float


class PoolCosts(Protocol):
    """Costs per stage. Seconds are per micro-batch unless noted; `(n, n)` is by first layer and one past the last, n = layers + 1."""

    @property
    def layers(self) -> int: ...

    @property
    def pools(self) -> tuple[Pool, ...]: ...

    @property
    def transfers(self) -> Transfers: ...

    def micro_batch_sizes(self) -> tuple[int, ...]:
        """Returns the sizes for which there is a profile."""
        ...

    def shapes(self, size: int) -> tuple[Shape, ...]:
        """Returns the shapes for which there is a profile of this micro-batch size."""
        ...

    def seconds(self, shape: Shape, size: int) -> Floats:
        """Returns the seconds forward and backward, for each layer."""
        ...

    def update_s(self, shape: Shape, size: int) -> Floats:
        """Returns the seconds of the optimizer's update of a stage, once a step; (n, n)."""
        ...

    def footprint(self, shape: Shape, size: int, shared: bool) -> Footprint:
        """Returns the bytes of a stage on each of its devices; `shared` if it has more than one replica."""
        ...

    def forward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """Returns the seconds of the activations that cross the boundary before each layer; (n,)."""
        ...

    def backward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """Returns the seconds of the gradients that cross the boundary before each layer; (n,)."""
        ...

    def sync_s(self, makeup: Makeup) -> Floats:
        """Returns the seconds to add the gradients of a stage's replicas, once a step; (n, n)."""
        ...


def spans(per_layer: Floats) -> Floats:
    """Returns sums over `[first, stop)` of a value per layer, shape (layers + 1, layers + 1); only `first < stop` is meaningful."""
    sums = np.concatenate([[0.0], np.cumsum(per_layer)])
    return sums[None, :] - sums[:, None]
