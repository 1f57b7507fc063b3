"""How a layer is run: precision, recomputation, and the alias passed as its input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic.engine.loss_scale import LossScale
from elastic.memory import device


class Alias(torch.autograd.Function):
    """The same memory as a new non-leaf, non-view tensor, so that a layer may begin with an in-place operation."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor) -> torch.Tensor:
        """Shares memory and version counter with `source`."""
        return source.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Passes the gradient on."""
        return gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Numerics:
    """Settings on which the bits of a layer's result depend, besides its input and parameters."""

    seed: int
    autocast: torch.dtype | None = None
    checkpoint: Callable[[int, nn.Module], bool] | None = None
    scale: LossScale | None = None

    def precision(self) -> AbstractContextManager[Any]:
        """Returns the autocast context for one layer; casts are cached only inside it."""
        return torch.autocast(device.current().type, dtype=self.autocast) if self.autocast is not None else nullcontext()

    def recomputes(self, layer: int, module: nn.Module) -> bool:
        """Whether the layer keeps only its input and runs again in backward."""
        return self.checkpoint is not None and self.checkpoint(layer, module)


def alias(leaf: torch.Tensor) -> torch.Tensor:
    """Returns the tensor that is passed to the layer in place of the leaf."""
    return Alias.apply(leaf) if leaf.requires_grad else leaf.detach()  # pyright: ignore[reportReturnType]
