"""The whole model as one layer, whose forward is a run of the user's loop body: forward, loss and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from elastic.memory.raw import checksum_of
from elastic.memory.tensors import bytes_of, contiguous, copy

Compute = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
Gradients = Sequence[tuple[nn.Parameter, torch.Tensor | None]]


class Body(nn.Module):
    """A module with the model's own parameters, buffers, submodules and attributes, under the same names: they share one `__dict__`.

    Calling it runs `_compute`, not the model's forward or hooks.
    """

    _compute: Compute

    def __call__(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return type(self)._compute(key)


def body_of(model: nn.Module, compute: Compute) -> Body:
    """Returns the model as such a layer. `compute` gets the key of a micro-batch, and returns its loss and weight."""
    kind = type(type(model).__name__, (Body,), {"_compute": staticmethod(compute)})  # named in messages as the user's class
    body = kind.__new__(kind)
    object.__setattr__(body, "__dict__", model.__dict__)
    return body


class _Handover(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, loss: torch.Tensor, gradients: Gradients) -> torch.Tensor:
        ctx.gradients = gradients
        return copy(loss.detach())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None, None]:
        for parameter, gradient in ctx.gradients:
            parameter.grad = gradient
        return None, None, None


def handed_over(loss: torch.Tensor, gradients: Gradients) -> torch.Tensor:
    """Returns the loss as a tensor whose backward stores these gradients in the parameters' `.grad`.

    The engine may drop a forward, or keep its backward for the next view: so the gradients belong to the graph, not to the parameters.
    """
    return _Handover.apply(torch.tensor(0.0, requires_grad=True), loss, gradients)  # pyright: ignore[reportReturnType]


def checksum(gradients: Iterable[torch.Tensor | None]) -> str:
    """Returns a checksum of the bits of gradients."""
    dense = (each.to_dense() if each.is_sparse else each for each in gradients if each is not None)
    return checksum_of(bytes_of(contiguous(each)) for each in dense)


def take_gradients(parameters: Iterable[nn.Parameter]) -> Gradients:
    """Returns the gradients of parameters, which have none afterwards."""
    found = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in found:
        parameter.grad = None
    return found
