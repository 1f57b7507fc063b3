"""Tells of each `backward` that the user's code calls: torch has no hook for it that knows the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

Heard = Callable[[torch.Tensor], None]

_original = torch.autograd.backward


def hear(begins: Callable[[], bool], heard: Heard, skips: Callable[[], bool] = lambda: False) -> None:
    """Calls `begins` before each backward, and if that returns True, `heard` with the backward's value when it has returned.

    A backward for which `skips` then returns True computes no gradients.

    The value of several tensors, or of one that is not a scalar, is the sum of their products with the gradients that are given for them:
    whose gradient it computes. A backward inside of another (as of activation checkpointing) is a part of it.
    """
    inside = False

    @wraps(_original)
    def backward(tensors: Any, grad_tensors: Any = None, *arguments: Any, **options: Any) -> None:
        nonlocal inside
        if inside or not begins():
            return _original(tensors, grad_tensors, *arguments, **options)
        if skips():
            return heard(_value(tensors, grad_tensors))
        inside = True
        try:
            _original(tensors, grad_tensors, *arguments, **options)
        finally:
            inside = False
        return heard(_value(tensors, grad_tensors))

    torch.autograd.backward = backward  # Tensor.backward calls this one


def _value(tensors: Any, gradients: Any) -> torch.Tensor:
    values = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    given: Sequence[Any] = [gradients] if gradients is None or isinstance(gradients, torch.Tensor) else list(gradients)
    total: torch.Tensor | None = None
    for place, tensor in enumerate(values):
        factor = given[place] if place < len(given) else None
        value = tensor.detach() if factor is None else (tensor.detach() * factor).sum()
        total = value if total is None else total + value
    assert total is not None  # torch has refused an empty list
    return total.reshape(())
