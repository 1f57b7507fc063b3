"""A fake device whose tensors do not share memory with the host: reads are copies, and only `Landing.take` writes to a tensor.

The tests replace shared memory by this. Code that violates the contract of `elastic.memory` then computes other bits: code that keeps old
bytes, writes to bytes that were for reading, or uses a tensor before it has taken the received bytes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elastic.memory import raw, tensors
from elastic.memory.tensors import HostBytes, Landing, bytes_of

landings: list[Landing] = []
"""All that were made since `put_apart`."""


def put_apart(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone."""
    landings.clear()
    patch.setattr(tensors, "_on_host", lambda tensor: tensor.detach().clone())
    patch.setattr(HostBytes, "now", _now)
    patch.setattr(Landing, "__init__", _land)
    patch.setattr(Landing, "take", _take)


def _now(self: HostBytes) -> np.ndarray:
    return bytes_of(self.tensor)


def _land(self: Landing, tensor: torch.Tensor) -> None:
    self._tensor = tensor
    self.bytes = raw.empty(tensor.numel() * tensor.element_size())
    self.bytes[:] = 0xA5
    landings.append(self)


def _take(self: Landing) -> torch.Tensor:
    with torch.no_grad():
        self._tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(self.bytes))
    return self._tensor
