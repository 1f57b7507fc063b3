"""The dtypes of torch by name."""

from __future__ import annotations

import torch

from elastic.errors import CheckpointError


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of torch with this name. Raises CheckpointError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"unknown dtype {name!r}")
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """Returns torch's name of the dtype, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def itemsize(name: str) -> int:
    """Returns the bytes of one element of this dtype. Raises CheckpointError if there is no such dtype."""
    return dtype_of(name).itemsize
