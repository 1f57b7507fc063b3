"""Host memory that a device copies to by itself: it outlives this process, if that has a segment, and is pinned."""

from __future__ import annotations

import warnings

import torch

from elastic.memory import device
from elastic.memory.tensors import bytes_of, host_lasting


class PinnedMemory:
    """Allocates pinned memory, and unpins all of it at `release`. Where pinning is refused, copies to it block; it says so once."""

    _warned = False

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor] = []
        self.refused = False
        """Whether copies to some of the memory block, since it could not be pinned."""

    def lasting(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Allocates a flat tensor of zeros.

        Raises:
            MemoryError: if the segment has no room.
        """
        memory = host_lasting(elements, dtype)
        if elements and device.pin(bytes_of(memory)):
            self._pinned.append(memory)
        elif elements:
            self.refused = True
            self._warn()
        return memory

    @staticmethod
    def _warn() -> None:
        if not PinnedMemory._warned:
            PinnedMemory._warned = True
            warnings.warn(
                "this system refuses to pin memory (raise `ulimit -l`): copies of the state from the device block the training instead of "
                "being made while the next step computes",
                stacklevel=3,
            )

    def release(self) -> None:
        """Unpins all memory. No copy to it may be under way."""
        for memory in self._pinned:
            device.unpin(memory.data_ptr())
        self._pinned = []
