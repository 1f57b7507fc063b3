"""Computes the costs of a transformer's layers from its dimensions alone, on request, if nothing was measured.

Floating-point operations: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters" (2021), section 5.1. Bytes of
activations: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), equations 1 and 2, in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster, DeviceKind, LinkEnd
from elastic.plan.division.physical import all_reduce_s
from elastic.plan.file_fields import item, number, sequence, whole
from elastic.plan.profiles import LayerBytes, LayerSeconds, Measured, Profiles

_ACTIVATION_BYTES = 2
_WHOLE_NUMBERS = ("layers", "hidden", "heads", "sequence", "vocabulary")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformer:
    """A decoder: an embedding, `layers` blocks and a head. `utilisation` is the part of a device's peak FLOPS that is reached.

    `sizes` are the possible numbers of samples per micro-batch, `degrees` the possible tensor-parallel degrees; `parameter_bytes` is the
    size of one parameter. Raises PlanError naming the invalid field.
    """

    layers: int
    hidden: int
    heads: int
    sequence: int
    vocabulary: int
    utilisation: float
    parameter_bytes: float = 4.0
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    degrees: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            if getattr(self, name) < 1:
                raise PlanError(f"transformer.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.utilisation <= 1:
            raise PlanError(f"transformer.utilisation is {self.utilisation}; it must be a share of the peak, above 0 and at most 1")
        if not self.sizes or not self.degrees or min(*self.sizes, *self.degrees) < 1:
            raise PlanError(f"transformer.sizes {list(self.sizes)} and degrees {list(self.degrees)} must not be empty or below 1")
        if bad := [tp for tp in self.degrees if self.heads % tp or self.hidden % tp]:
            raise PlanError(f"transformer.degrees: {self.heads} heads and a hidden size of {self.hidden} cannot be split {bad[0]} ways")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Transformer:
        """Reads a table of the fields. Raises PlanError naming one that is missing, unknown or not a number."""
        known = {*_WHOLE_NUMBERS, "utilisation", "parameter_bytes", "sizes", "degrees"}
        if strange := sorted(set(data) - known):
            raise PlanError(f"transformer.{strange[0]} is not known; the fields are {', '.join(sorted(known))}")
        values: dict[str, Any] = {name: whole(item(data, name, "transformer"), f"transformer.{name}") for name in _WHOLE_NUMBERS}
        values["utilisation"] = number(item(data, "utilisation", "transformer"), "transformer.utilisation")
        if "parameter_bytes" in data:
            values["parameter_bytes"] = number(data["parameter_bytes"], "transformer.parameter_bytes")
        values |= {name: sequence(data[name], f"transformer.{name}", whole) for name in ("sizes", "degrees") if name in data}
        return cls(**values)

    @property
    def block_parameters(self) -> int:
        """Weights and biases of attention and MLP, and two norms."""
        return 12 * self.hidden**2 + 13 * self.hidden

    def forward_flops(self, samples: int) -> tuple[float, float]:
        """Returns the floating-point operations of one block, and of the head."""
        tokens = samples * self.sequence
        return 24 * tokens * self.hidden**2 + 4 * tokens * self.sequence * self.hidden, 2 * tokens * self.hidden * self.vocabulary

    def profiles(self, cluster: Cluster) -> Profiles:
        """Returns profiles for all kinds of the cluster, without updates (bound by memory). Raises PlanError for a kind without FLOPS."""
        seconds = {
            Measured(kind.name, size, tp): self._seconds(kind, size, tp, cluster)
            for kind in cluster.kinds.values()
            for size in self.sizes
            for tp in self.degrees
            if tp == 1 or any(host.kind == kind.name and host.count >= tp for host in cluster.hosts)
        }
        return Profiles(seconds=seconds, bytes={tp: self._bytes(tp) for tp in {1, *self.degrees}})

    def _seconds(self, kind: DeviceKind, size: int, tp: int, cluster: Cluster) -> tuple[LayerSeconds, ...]:
        if kind.flops is None:
            raise PlanError(f"kinds.{kind.name} needs flops, since nothing was measured on it")
        rate = kind.flops * self.utilisation * tp
        block, head = self.forward_flops(size)
        joining_s = self._joining_s(kind, size, tp, cluster)  # twice in each direction: after attention and after the MLP
        inner = LayerSeconds(block / rate + 2 * joining_s, 2 * block / rate + 2 * joining_s, 0.0)
        return LayerSeconds(0.0, 0.0, 0.0), *(inner,) * self.layers, LayerSeconds(head / rate, 2 * head / rate, 0.0)

    def _joining_s(self, kind: DeviceKind, size: int, tp: int, cluster: Cluster) -> float:
        if tp == 1:
            return 0.0
        host = next(host for host in cluster.hosts if host.kind == kind.name and host.count >= tp)
        place = LinkEnd(host.zone, kind.name, 1, host.name)
        message = np.array([_ACTIVATION_BYTES * size * self.sequence * self.hidden], dtype=float)
        return float(all_reduce_s(message, tp, cluster.links.curve(place, place))[0])

    def _bytes(self, tp: int) -> tuple[LayerBytes, ...]:
        table = self.parameter_bytes * self.vocabulary * self.hidden / tp
        output = _ACTIVATION_BYTES * self.sequence * self.hidden
        attention = 5 * self.heads * self.sequence / self.hidden
        kept = self.sequence * self.hidden * (34 if tp == 1 else 10 + 24 / tp) + self.sequence * self.hidden * attention / tp
        block = LayerBytes(self.parameter_bytes * self.block_parameters / tp, kept, output)
        logits = 2 * _ACTIVATION_BYTES * self.sequence * self.vocabulary / tp
        return LayerBytes(table, output, output), *(block,) * self.layers, LayerBytes(table, output + logits, output)
