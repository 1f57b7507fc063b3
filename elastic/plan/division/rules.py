"""The interface of a cost model: what a stage, a transfer, a synchronisation and an update take, and what a stage keeps in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elastic.plan.division.shapes import Makeup, Pool, Shape

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfers:
    """How often a stage is charged, per micro-batch, for sending its activations on and its gradients back.

    `first` is for the first stage, by the number of stages (its last entry stands for all above); `middle` for both directions of a stage
    in between; `last` for the last one. A lone stage sends nothing.
    """

    first: tuple[float, ...]
    middle: float
    last: float

    def of_first(self, depth: int) -> float:
        """The charge for the first of `depth` stages."""
        return self.first[min(depth, len(self.first)) - 1]


class Footprint(Protocol):
    """Bytes on one device by first layer and layer behind the last, shape (layers + 1, layers + 1)."""

    @property
    def fixed(self) -> Floats: ...

    @property
    def in_flight(self) -> Floats:
        """What each micro-batch in flight adds."""
        ...

    @property
    def capacity(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """The plain `Footprint`."""

    fixed: Floats
    in_flight: Floats
    capacity: float


class PoolCosts(Protocol):
    """All seconds are of one micro-batch unless said otherwise; `(n, n)` is by first layer and layer behind the last, n = layers + 1."""

    @property
    def layers(self) -> int: ...

    @property
    def pools(self) -> tuple[Pool, ...]: ...

    @property
    def transfers(self) -> Transfers: ...

    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The sizes for which there is a profile."""
        ...

    def shapes(self, size: int) -> tuple[Shape, ...]:
        """The shapes for which there is a profile of this micro-batch size."""
        ...

    def seconds(self, shape: Shape, size: int) -> Floats:
        """Forward and backward, for each layer."""
        ...

    def update_s(self, shape: Shape, size: int) -> Floats:
        """The optimizer's update of a stage, once a step; (n, n)."""
        ...

    def footprint(self, shape: Shape, size: int, shared: bool) -> Footprint:
        """What a stage keeps on each of its devices; `shared` if it has more than one replica."""
        ...

    def forward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """Activations that cross the boundary before each layer; (n,)."""
        ...

    def backward_s(self, sender: Shape, receiver: Shape, size: int) -> Floats:
        """Gradients that cross the boundary before each layer; (n,)."""
        ...

    def sync_s(self, makeup: Makeup) -> Floats:
        """Adding the gradients of a stage's replicas, once a step; (n, n)."""
        ...


def spans(per_layer: Floats) -> Floats:
    """Sums over `[first, behind)` of a value per layer, shape (layers + 1, layers + 1); only `first < behind` is meaningful."""
    sums = np.concatenate([[0.0], np.cumsum(per_layer)])
    return sums[None, :] - sums[:, None]
