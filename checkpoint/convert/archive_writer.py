"""Writes archives that `torch.load` reads, a run at a time: what `torch.save` would need all tensors in memory for."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import _utils

from checkpoint.convert.nested import Leaf
from checkpoint.convert.stored import dtype_of, itemsize, memory_of
from checkpoint.state import Spec
from elastic.errors import CheckpointError

ALIGNMENT = 64
"""Bytes: torch aligns the data of records so."""

_CLASSIC = {torch.float32: "FloatStorage", torch.float64: "DoubleStorage", torch.float16: "HalfStorage", torch.bfloat16: "BFloat16Storage"}
_CLASSIC |= {torch.int64: "LongStorage", torch.int32: "IntStorage", torch.int16: "ShortStorage", torch.int8: "CharStorage"}
_CLASSIC |= {
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}

Runs = Callable[[Leaf], Iterable[torch.Tensor]]
"""The values of a leaf, run by run, flat."""


def raw(flat: torch.Tensor) -> memoryview:
    """The memory of a flat tensor."""
    return memory_of(flat.contiguous())


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    spec: Spec


class _Pickler(pickle.Pickler):
    """Leaves become tensors of torch; so do real tensors, which are small."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, protocol=2)
        self.storages: dict[Leaf | int, _Storage] = {}
        self.small: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind, count = _CLASSIC.get(dtype_of(obj.spec.dtype)), math.prod(obj.spec.shape)
        if kind is None:
            return "storage", torch.storage.UntypedStorage, obj.key, "cpu", count * itemsize(obj.spec.dtype)
        return "storage", getattr(torch, kind), obj.key, "cpu", count

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Leaf):
            return self._tensor(obj, obj.spec)
        if isinstance(obj, torch.Tensor):
            self.small.append(obj)
            return self._tensor(id(obj), Spec(shape=tuple(obj.shape), dtype=str(obj.dtype).removeprefix("torch.")))
        return NotImplemented

    def _tensor(self, key: Leaf | int, spec: Spec) -> tuple[Any, tuple[Any, ...]]:
        storage = self.storages.setdefault(key, _Storage(str(len(self.storages)), spec))
        strides = tuple(math.prod(max(1, extent) for extent in spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
        dtype = dtype_of(spec.dtype)
        if dtype in _CLASSIC:
            return _utils._rebuild_tensor_v2, (storage, 0, spec.shape, strides, False, OrderedDict())
        return _utils._rebuild_tensor_v3, (storage, 0, spec.shape, strides, False, OrderedDict(), dtype)


def _plain(value: Any) -> Any:
    """The value without subclasses that would put names into the pickle."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class _Zip:
    """A zip file of uncompressed records with zip64 sizes, starting where the stream is; the data of each record is aligned."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.start, self.entries = stream, stream.tell(), []

    def record(self, name: str, length: int, parts: Iterable[memoryview | bytes]) -> None:
        at, stored = self.stream.tell() - self.start, f"archive/{name}".encode()
        fixed = 30 + len(stored) + 20 + 4
        padding = -(at + fixed) % ALIGNMENT
        extra = struct.pack("<HHQQ", 1, 16, length, length) + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        header = struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 33, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(stored), len(extra))
        self.stream.write(header + stored + extra)
        crc = written = 0
        for part in parts:
            self.stream.write(part)
            crc, written = zlib.crc32(part, crc), written + len(part)
        if written != length:
            raise CheckpointError(f"record {name} should have {length} bytes, {written} came")
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


def write_archive(stream: BinaryIO, value: Any, runs: Runs) -> None:
    """Writes `value` at the stream's position as `torch.save` would; each `Leaf` in it is a tensor whose values `runs` gives."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(_plain(value))
    small = {id(tensor): tensor for tensor in pickler.small}
    archive = _Zip(stream)
    archive.record("data.pkl", pickled.tell(), [pickled.getvalue()])
    archive.record("byteorder", 6, [b"little"])
    for key, storage in pickler.storages.items():
        values = runs(key) if isinstance(key, Leaf) else [small[key].reshape(-1)]
        length = math.prod(storage.spec.shape) * itemsize(storage.spec.dtype)
        archive.record(f"data/{storage.key}", length, (raw(flat) for flat in values))
    archive.record("version", 2, [b"3\n"])
    archive.finish()
