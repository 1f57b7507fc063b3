"""Optimizer and scheduler settings as JSON and back: numbers, strings, tuples, and small tensors, without pickle."""

from __future__ import annotations

from typing import Any

import torch


def to_plain(value: Any) -> Any:
    """JSON types only. Raises TypeError for what cannot travel, such as a function."""
    if isinstance(value, torch.Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), value.detach().reshape(-1).tolist()]}
    if isinstance(value, dict):
        if any(not isinstance(key, str | int) for key in value):
            raise TypeError(f"a dict with keys {list(value)} cannot travel")
        return {"dict": [[key, to_plain(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [to_plain(item) for item in value]}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot travel")


def from_plain(value: Any) -> Any:
    """The inverse."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        dtype, shape, numbers = value["tensor"]
        return torch.tensor(numbers, dtype=getattr(torch, dtype)).reshape(shape)
    if "tuple" in value:
        return tuple(from_plain(item) for item in value["tuple"])
    return {key: from_plain(item) for key, item in value["dict"]}
