"""Tensors of a pickle: where they lie in the file, not what they hold. Every number of the pickle's is checked before it is used."""

from __future__ import annotations

import math
from typing import Any

import torch

from elastic.checkpoint.pickles.origin import Origin
from elastic.checkpoint.pickles.values import Storage
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Strided, dtype_of, name_of

_DIMENSIONS = 64
EXPANDED_LIMIT = 1 << 20
"""Elements of a tensor that has more of them than its storage, as an expanded one does."""


def tensor(origin: Origin, held: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Strided:
    """What `torch._utils._rebuild_tensor_v2` and `_v3` are asked for.

    Raises CheckpointError if the view leaves its storage, or has many more elements than it.
    """
    if not isinstance(held, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise origin.refuse("it makes a tensor from something that is not a storage, a size and a stride")

    def refuse(what: str) -> Exception:
        return origin.refuse(f"a tensor in storage {held.key!r} {what}")

    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None) or dtype_of(held.dtype or "uint8")
    numbers = (held.count, offset, *shape, *stride)
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
        raise refuse("has sizes, strides or an offset that are no lengths")
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
    spec = Spec(shape=shape, dtype=name_of(dtype))
    return Strided(files=origin.files, path=origin.path, offset=begin + offset * dtype.itemsize, spec=spec, strides=stride)
