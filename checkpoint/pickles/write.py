"""Writes files that `torch.load` opens, without a whole tensor in memory.

The members are those of `torch.save` (torch 2.13, `torch/serialization.py`): `data.pkl`, `byteorder`, `data/<key>`, `version`; storages
start at multiples of 64 bytes, so that torch can map them. This file makes the zip archive itself, with sizes of 64 bits, because it may
begin anywhere in a stream (as a chunk of a distributed checkpoint does), which `zipfile` does not support.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import _utils

from elastic.checkpoint.dtypes import dtype_of, name_of
from elastic.checkpoint.pickles.calls import STORAGES
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import raw
from elastic.errors import CheckpointError

ALIGNMENT = 64
"""Bytes: storages start at multiples of it."""

_CLASSIC = {dtype: kind for kind, dtype in STORAGES.items() if dtype}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Streamed:
    """A tensor to write. `chunks` returns its elements in row-major order, flat, in parts of any length; called when they are written."""

    spec: Spec
    chunks: Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _StorageToWrite:
    key: str
    spec: Spec


class _StatePickler(pickle.Pickler):
    """Pickles a `Streamed` and a real (small) tensor as a tensor of torch; one that occurs twice is stored once."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.streams: list[Streamed] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _StorageToWrite):
            return None
        kind, count = _CLASSIC.get(obj.spec.dtype), obj.spec.elements
        if kind is None:
            return "storage", torch.storage.UntypedStorage, obj.key, "cpu", count * obj.spec.itemsize
        return "storage", getattr(torch, kind), obj.key, "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            spec = Spec(shape=tuple(obj.shape), dtype=name_of(obj.dtype))
            return self._tensor(Streamed(spec=spec, chunks=lambda: [obj.detach().reshape(-1)]))
        return self._tensor(obj) if isinstance(obj, Streamed) else NotImplemented

    def _tensor(self, stream: Streamed) -> tuple[Any, tuple[Any, ...]]:
        spec, storage = stream.spec, _StorageToWrite(str(len(self.streams)), stream.spec)
        self.streams.append(stream)
        strides = tuple(math.prod(max(1, extent) for extent in spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
        if spec.dtype in _CLASSIC:
            return _utils._rebuild_tensor_v2, (storage, 0, spec.shape, strides, False, OrderedDict())
        return _utils._rebuild_tensor_v3, (storage, 0, spec.shape, strides, False, OrderedDict(), dtype_of(spec.dtype))


class _Zip:
    """A zip file of uncompressed members with sizes of 64 bits, from the stream's position on; the data of each member is aligned."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.start, self.entries = stream, stream.tell(), []

    def member(self, name: str, length: int, parts: Iterable[memoryview | bytes]) -> None:
        at, stored = self.stream.tell() - self.start, f"archive/{name}".encode()
        fixed = 30 + len(stored) + 20 + 4
        padding = -(at + fixed) % ALIGNMENT
        # padding is in an extra field without meaning ("FB", as torch names it)
        extra = struct.pack("<HHQQ", 1, 16, length, length) + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 33, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(stored), len(extra))
        self.stream.write(header + stored + extra)
        crc = written = 0
        for part in parts:
            self.stream.write(part)
            crc, written = zlib.crc32(part, crc), written + len(part)
        if written != length:
            raise CheckpointError(f"member {name} should have {length} bytes, but {written} were given")
        end = self.stream.tell()
        self.stream.seek(self.start + at + 14)
        self.stream.write(struct.pack("<L", crc))
        self.stream.seek(end)
        self.entries.append((stored, at, length, crc))

    def finish(self) -> None:
        begin = self.stream.tell() - self.start
        for name, at, length, crc in self.entries:
            extra = struct.pack("<HHQQQ", 1, 24, length, length, at)
            fields = (45, 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF)
            self.stream.write(struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields) + name + extra)
        end, count = self.stream.tell() - self.start, len(self.entries)
        self.stream.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, end - begin, begin))
        self.stream.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        self.stream.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, min(count, 0xFFFF), min(count, 0xFFFF), 0xFFFFFFFF, 0xFFFFFFFF, 0))


def write_archive(stream: BinaryIO, value: Any) -> None:
    """Writes `value` at the stream's position as `torch.save` would; its tensors are `Streamed`, or small real ones.

    Raises CheckpointError if a stream's length differs from its shape.
    """
    pickled = io.BytesIO()
    pickler = _StatePickler(pickled)
    pickler.dump(value)
    archive = _Zip(stream)
    archive.member("data.pkl", pickled.tell(), [pickled.getvalue()])
    archive.member("byteorder", 6, [b"little"])
    for key, tensor in enumerate(pickler.streams):
        length = tensor.spec.bytes
        archive.member(f"data/{key}", length, (raw(flat) for flat in tensor.chunks()))
    archive.member("version", 2, [b"3\n"])
    archive.finish()


def save(value: Any, path: Path) -> None:
    """Writes `value` to a new file. Raises OSError and CheckpointError."""
    with path.open("xb") as stream:
        write_archive(stream, value)
