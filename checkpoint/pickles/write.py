"""Files that `torch.load` opens, written without holding a whole tensor.

The members are those of `torch.save` (torch 2.13, `torch/serialization.py`): `data.pkl`, `byteorder`, `data/<key>`, `version`; storages
start at multiples of 64 bytes, so that torch can map them.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

_ALIGNMENT = 64
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
STORABLE = frozenset(_STORAGES)
"""Dtypes that `save` can write."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streamed:
    """A tensor to write: `chunks` gives its elements in row-major order, flat, in parts of any length, when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: Callable[[], Iterator[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    count: int


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.streams: list[Streamed] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Streamed):
            return NotImplemented
        storage = _Storage(str(len(self.streams)), obj.dtype, math.prod(obj.shape))
        self.streams.append(obj)
        strides = [math.prod(obj.shape[position + 1 :]) for position in range(len(obj.shape))]
        return _rebuild_tensor_v2, (storage, 0, obj.shape, tuple(strides), False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.count)
        return None


def save(value: Any, path: Path) -> None:
    """Writes `value`, whose tensors are `Streamed`, to a new file.

    Raises OSError, and ValueError if a stream has another length than its shape.
    """
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(value)
    with path.open("xb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled.getvalue())
        file.writestr("archive/byteorder", b"little")
        for key, stream in enumerate(pickler.streams):
            _write(file, f"archive/data/{key}", stream, raw.tell())
        file.writestr("archive/version", b"3\n")


def _write(file: zipfile.ZipFile, name: str, stream: Streamed, position: int) -> None:
    size = math.prod(stream.shape) * stream.dtype.itemsize
    info = zipfile.ZipInfo(name)
    info.file_size = size
    zip64 = size >= zipfile.ZIP64_LIMIT // 2
    # An extra field of no meaning ("FB", as torch has it) pads; zipfile puts its own of 20 bytes before it where sizes need 64 bits.
    header = position + 30 + len(name) + 4 + (20 if zip64 else 0)
    gap = -header % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", gap) + b"\0" * gap
    written = 0
    with file.open(info, "w", force_zip64=zip64) as member:
        for chunk in stream.chunks():
            written += member.write(chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data) if chunk.numel() else 0
    if written != size:
        raise ValueError(f"{name} has {written} bytes instead of {size}")
