"""What one step costs: per layer and micro-batch, and how the step's global batch is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic.errors import PlanError

MOST_GRAINS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """One layer and one micro-batch: seconds forward and backward, elements of trainable parameters, bytes of kept activations."""

    forward_s: float
    backward_s: float
    parameters: int
    activation_bytes: int

    def __post_init__(self) -> None:
        for field in ("forward_s", "backward_s", "parameters", "activation_bytes"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise PlanError(f"{field} of a layer is {value}; it must be finite and not negative: measure the layers again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The layers in order, the micro-batches of a step, and the grains: equal runs of consecutive micro-batches, the unit of routing."""

    layers: tuple[LayerCost, ...]
    micro_batches: int
    grains: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise PlanError("a workload needs at least one layer")
        if self.micro_batches < 1 or self.grains < 1 or self.micro_batches % self.grains:
            raise PlanError(
                f"{self.micro_batches} micro-batches cannot be cut into {self.grains} grains of equal size: choose a divisor, "
                f"such as {default_grains(max(self.micro_batches, 1))}"
            )

    def micro_batches_of(self, grain: int) -> range:
        """The micro-batches of one grain."""
        size = self.micro_batches // self.grains
        return range(grain * size, (grain + 1) * size)

    def grain_of(self, micro_batch: int) -> int:
        """The grain that holds a micro-batch."""
        return micro_batch * self.grains // self.micro_batches

    def to_json(self) -> dict[str, Any]:
        """One short list per layer."""
        layers = [[layer.forward_s, layer.backward_s, layer.parameters, layer.activation_bytes] for layer in self.layers]
        return {"layers": layers, "micro_batches": self.micro_batches, "grains": self.grains}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Workload:
        """The inverse of `to_json`."""
        return cls(layers=costs(data["layers"]), micro_batches=data["micro_batches"], grains=data["grains"])


def costs(profile: Sequence[Sequence[Any]]) -> tuple[LayerCost, ...]:
    """Layer costs from a measured profile: `[forward_s, backward_s, parameters, activation_bytes]` per layer."""
    return tuple(
        LayerCost(forward_s=forward, backward_s=backward, parameters=parameters, activation_bytes=activations)
        for forward, backward, parameters, activations in profile
    )


def default_grains(micro_batches: int) -> int:
    """The largest divisor of `micro_batches` up to `MOST_GRAINS`."""
    return max(grains for grains in range(1, MOST_GRAINS + 1) if micro_batches % grains == 0)
