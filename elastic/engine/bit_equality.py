"""Compares two values of an optimizer or a scheduler bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from elastic.memory.tensors import bytes_of


def same(one: Any, other: Any) -> bool:
    """Returns whether type, shape and bits are equal, so NaN equals itself. Containers compare their items; other types use `==`."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and np.array_equal(bytes_of(one), bytes_of(other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return one is other or repr(one) == repr(other) if isinstance(one, float) else bool(one == other)


def plain(value: Any) -> bool:
    """Returns whether the value is data: numbers, strings, tensors, arrays, None, and containers of these."""
    if isinstance(value, dict):
        return all(plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.Tensor | np.ndarray | np.generic)
