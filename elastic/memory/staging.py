"""Host memory between a device and a link. It is pinned, so that the device copies beside its computation, on streams for each direction.

The memory comes from torch's allocator, which keeps what was pinned, and gives it out again when nothing uses it, copies under way
included: so copies name tensors of that allocator. Where pinning is refused, the memory is ordinary: copies then block, with the same
result.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from elastic.memory import device, raw
from elastic.memory.tensors import Landing, contiguous_only, of_host_bytes

Part = bytes | torch.Tensor
"""What a message consists of: bytes of the host, or the values of a tensor, row-major."""

_warned = False


def _room(size: int) -> torch.Tensor:
    """Returns uninitialised host memory, pinned if the system allows it."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        _warn(error)
        return of_host_bytes(raw.empty(size), torch.uint8)


def _warn(error: RuntimeError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"this system refuses to pin memory (raise `ulimit -l`): the training waits while messages are copied from and to the device "
            f"({str(error).splitlines()[0]})",
            stacklevel=4,
        )


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the values of a tensor as bytes; shares the memory of a contiguous one."""
    return tensor.detach().reshape(-1).view(torch.uint8)


class Staged:
    """A message on its way from the device to the host. It keeps the tensors until they are copied."""

    def __init__(self, memory: torch.Tensor, copied: Any, tensors: Sequence[torch.Tensor]) -> None:
        self._memory, self._copied, self._tensors = memory, copied, tensors

    @property
    def over(self) -> bool:
        """Whether all bytes are on the host."""
        return self._copied is None or self._copied.query()

    def bytes(self) -> np.ndarray:
        """Returns the message once all its bytes are on the host; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied, self._tensors = None, ()
        return self._memory.numpy()


class Staging:
    """Copies beside the computation: down to the host, and up to the device."""

    def __init__(self) -> None:
        self._down, self._up = device.SideStream(), device.SideStream()

    def down(self, parts: Sequence[Part]) -> Staged:
        """Begins to copy parts into one message, as they are when all computation so far is done; returns at once."""
        views = [part if isinstance(part, bytes) else _flat(part) for part in parts]
        memory = _room(sum(map(len, views)))
        tensors, position = [], 0
        with self._down.after_computation():
            for view in views:
                place = memory[position : position + len(view)]
                position += len(view)
                if isinstance(view, bytes):
                    place.numpy()[:] = np.frombuffer(view, dtype=np.uint8)
                elif len(view):
                    place.copy_(view, non_blocking=True)
                    tensors.append(view)
        return Staged(memory, self._down.last if tensors else None, tensors)

    def up(self, memory: torch.Tensor, tensor: torch.Tensor) -> Any:
        """Begins to copy memory of `_room` into a tensor, which later computation then sees; returns an event behind the copy."""
        with self._up.after_computation(), torch.no_grad():
            _flat(tensor).copy_(memory, non_blocking=True)
        self._up.before_computation()
        return self._up.last


class StagedLanding(Landing):
    """A tensor of the device that a link fills through pinned memory."""

    __slots__ = ("_copied", "_room", "_staging")

    def __init__(self, tensor: torch.Tensor, staging: Staging) -> None:
        """Raises ValueError unless the tensor is contiguous."""
        self._tensor, self._staging = contiguous_only(tensor), staging
        self._room = _room(tensor.nbytes)
        self.bytes = self._room.numpy()
        self._copied: Any = None

    def begin(self) -> None:
        """Waits until the bytes have been copied up, if they were taken: they may then be written to again."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def take(self) -> torch.Tensor:
        """Returns the tensor. Call it when the bytes have arrived; all later computation sees them. The host does not wait."""
        if self.bytes.size:
            self._copied = self._staging.up(self._room, self._tensor)
        return self._tensor
