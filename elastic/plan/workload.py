"""The workload: the costs of a step per layer and micro-batch, and how its global batch is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from elastic.errors import PlanError

MOST_GRAINS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Costs of one layer for one micro-batch: seconds forward and backward, elements of trainable parameters, bytes of kept activations.

    `output_bytes` is the size of the output to the next layer; an element of a parameter has `item_bytes`. If the backward can be split,
    its two parts take `input_s`, for the gradient of the layer's input, and `weight_s`, for the rest; else both are 0. A layer that has
    parameters of several dtypes has their mean as `item_bytes`. `flops` counts the floating-point operations, forward and backward, 0 if
    they are unknown; plans do not depend on it. `frozen_bytes` are those of its tensors that are not trained.
    """

    forward_s: float
    backward_s: float
    parameters: int
    activation_bytes: int
    output_bytes: int = 0
    item_bytes: float = 4
    input_s: float = 0.0
    weight_s: float = 0.0
    flops: int = 0
    frozen_bytes: int = 0

    def __post_init__(self) -> None:
        for field in _FIELDS:
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise PlanError(f"{field} of a layer is {value}; it must be finite and not negative: measure the layers again")

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all the layer's trainable parameters."""
        return round(self.parameters * self.item_bytes)


_FIELDS = tuple(field.name for field in fields(LayerCost))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The layers in order, the micro-batches of a step, and the grains: equal runs of consecutive micro-batches, the unit of routing.

    The optimizer keeps `state_bytes` for each element of a parameter. A worker's device does `peak_flops` floating-point operations a
    second at most; 0 if unknown.
    """

    layers: tuple[LayerCost, ...]
    micro_batches: int
    grains: int
    state_bytes: float = 0.0
    peak_flops: float = 0.0

    def __post_init__(self) -> None:
        if not self.layers:
            raise PlanError("a workload needs at least one layer")
        if self.micro_batches < 1 or self.grains < 1 or self.micro_batches % self.grains:
            raise PlanError(
                f"{self.micro_batches} micro-batches cannot be cut into {self.grains} grains of equal size: choose a divisor, "
                f"such as {default_grains(max(self.micro_batches, 1))}"
            )

    @property
    def flops(self) -> int:
        """Floating-point operations of a step; 0 if those of a layer are unknown."""
        return self.micro_batches * sum(layer.flops for layer in self.layers)

    def micro_batches_of(self, grain: int) -> range:
        """Returns the micro-batches of one grain."""
        size = self.micro_batches // self.grains
        return range(grain * size, (grain + 1) * size)

    def grain_of(self, micro_batch: int) -> int:
        """Returns the grain that contains a micro-batch."""
        return micro_batch * self.grains // self.micro_batches

    def state_bytes_of(self, layer: int) -> float:
        """Bytes of a layer's optimizer state, without its parameters."""
        return self.layers[layer].parameters * self.state_bytes

    def to_json(self) -> dict[str, Any]:
        """Writes one short list per layer, without the bytes of what is not trained if there are none."""
        return {
            "layers": [[getattr(layer, name) for name in (_FIELDS if layer.frozen_bytes else _FIELDS[:-1])] for layer in self.layers],
            "micro_batches": self.micro_batches,
            "grains": self.grains,
            "state_bytes": self.state_bytes,
            "peak_flops": self.peak_flops,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        """The inverse of `to_json`."""
        return cls(**{**data, "layers": costs(data["layers"])})


def costs(profile: Sequence[Sequence[Any]]) -> tuple[LayerCost, ...]:
    """Makes layer costs from a measured profile: per layer the fields of LayerCost in order; the last ones may be missing."""
    return tuple(LayerCost(**dict(zip(_FIELDS, row, strict=False))) for row in profile)


def default_grains(micro_batches: int) -> int:
    """Returns the largest divisor of `micro_batches` up to `MOST_GRAINS`."""
    return max(grains for grains in range(1, MOST_GRAINS + 1) if micro_batches % grains == 0)
