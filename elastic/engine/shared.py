"""Exchange of memory between workers of one host: a message says where the values lie, and the receiver reads them there.

A link would copy them twice and check them twice. The sender must not write to the memory before the receiver has read it. READY rounds
ensure that: gradient sums are read before READY of their step, and released when the next step adds gradients; updated parameters are
read before READY of the next step, and written to after its APPLY.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from elastic.errors import GateRefused
from elastic.memory import device
from elastic.memory.raw import typed
from elastic.memory.segment import MappedSegment
from elastic.memory.tensors import of_bytes, place_of
from elastic.view import View

REFERENCE_BYTES = 8


class SharedMemory:
    """The other members of a view on this worker's host, and their segments. There are none if this worker has no segment."""

    def __init__(self, worker: int, view: View, segments: Mapping[int, MappedSegment]) -> None:
        """Raises GateRefused if the segment of such a member is missing. There are none if this worker computes on a device."""
        members = {member.worker: member for member in view.members}
        own = members[worker]
        alike = {w: each for w, each in members.items() if w != worker and each.host == own.host} if device.on_host() else {}
        near = [w for w, each in alike.items() if each.segment and own.segment]
        if missing := [other for other in near if other not in segments]:
            raise GateRefused(f"worker {worker} was not given the memory of workers {missing} of its host", check="segments")
        self._segments = {other: segments[other] for other in near}

    def __contains__(self, worker: int) -> bool:
        return worker in self._segments

    def release(self) -> None:
        """Lets go of the others' memory; nothing else may be called afterwards."""
        self._segments = {}

    @staticmethod
    def reference(tensor: torch.Tensor) -> bytes:
        """Returns what a message says of where a tensor lies. Raises ValueError if it is not in this worker's segment."""
        offset = place_of(tensor)
        if offset is None:
            raise ValueError("the tensor does not lie in this worker's segment")
        return offset.to_bytes(REFERENCE_BYTES, "little")

    def values(self, worker: int, reference: np.ndarray, size: int) -> np.ndarray:
        """Returns the bytes that another worker's reference refers to, read-only."""
        return self._segments[worker].bytes_at(_offset(reference), size)

    def tensor(self, worker: int, reference: np.ndarray, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns a flat tensor of what another worker's reference refers to; it must not be written to."""
        return of_bytes(self._segments[worker].private_bytes(_offset(reference), elements * dtype.itemsize), dtype)


def _offset(reference: np.ndarray) -> int:
    return int(typed(reference[:REFERENCE_BYTES], "<i8")[0])
