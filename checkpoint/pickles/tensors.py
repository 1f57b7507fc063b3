"""Locates the tensors of a pickle in its file without reading them. Every number from the pickle is checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from elastic.checkpoint.dtypes import dtype_of, name_of
from elastic.checkpoint.pickles.origin import Origin
from elastic.checkpoint.pickles.values import PickledStorage
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Strided

_DIMENSIONS = 64
EXPANDED_LIMIT = 1 << 20
"""Most elements of a tensor that has more elements than its storage, as an expanded one does."""


def tensor(origin: Origin, held: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Strided:
    """Evaluates a call of `torch._utils._rebuild_tensor_v2` or `_v3`.

    Raises CheckpointError if the view leaves its storage, has many more elements than it, or has an unknown property.
    """
    if not isinstance(held, PickledStorage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise origin.refuse("it makes a tensor from something that is not a storage, a size and a stride")

    def refuse(what: str) -> Exception:
        return origin.refuse(f"a tensor in storage {held.key!r} {what}")

    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None) or dtype_of(held.dtype or "uint8")
    numbers = (held.count, offset, *shape, *stride)
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise refuse("has sizes, strides or an offset that are not counts")
    if len(shape) != len(stride) or len(shape) > _DIMENSIONS:
        raise refuse(f"has {len(shape)} sizes and {len(stride)} strides")
    begin, room = origin.storage(held.key)
    expected = held.count * (dtype_of(held.dtype).itemsize if held.dtype else 1)
    if room != expected:
        raise refuse(f"has a storage of {room} bytes instead of {expected}")
    size, count = math.prod(shape), room // dtype.itemsize
    reach = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    if size and reach >= count:
        raise refuse(f"reaches element {reach} of a storage of {count}")
    if size > max(count, EXPANDED_LIMIT):
        raise refuse(f"has {size} elements in a storage of {count}")
    return Strided(
        files=origin.files,
        path=origin.path,
        offset=begin + offset * dtype.itemsize,
        spec=Spec(shape=shape, dtype=name_of(dtype)),
        strides=stride,
        **_lazy_bits(rest, dtype, refuse),
    )


def _lazy_bits(rest: tuple[Any, ...], dtype: torch.dtype, refuse: Callable[[str], Exception]) -> dict[str, bool]:
    """Returns the bits of a lazily conjugated or negated view, from the last argument (torch's `_get_tensor_metadata`)."""
    at = 3 if len(rest) > 2 and isinstance(rest[2], torch.dtype) else 2  # after requires_grad, hooks and, in v3, the dtype
    metadata = rest[at] if len(rest) > at else None
    if metadata is None or metadata == {}:
        return {}
    if not isinstance(metadata, dict) or set(metadata) - {"conj", "neg"} or not all(type(bit) is bool for bit in metadata.values()):
        shown = ", ".join(map(str, metadata)) if isinstance(metadata, dict) else type(metadata).__name__
        raise refuse(f"has the unknown properties {shown}")
    if metadata.get("conj") and not dtype.is_complex:
        raise refuse(f"is conjugated, but its dtype is {name_of(dtype)}")
    return {"conjugate": metadata.get("conj", False), "negative": metadata.get("neg", False)}
