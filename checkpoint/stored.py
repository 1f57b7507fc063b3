"""Tensors in files of any format, read by byte range, a run at a time, never a whole file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from elastic.checkpoint.dtypes import dtype_of
from elastic.checkpoint.state import Spec
from elastic.errors import CheckpointError
from elastic.layout.boxes import Box, boxes_of_run, intersection, runs_of_box
from elastic.memory.raw import room
from elastic.memory.tensors import Landing, bytes_of, on_host, strided

STRIDED_LIMIT = 256 << 20
"""Largest span (bytes) that is read at once for a tensor whose strides are not a permutation of dense ones."""


OPEN_LIMIT = 64
"""Most files of one checkpoint that are open at a time: some formats have one for every state of every parameter."""


def memory_of(flat: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous flat tensor, to be filled."""
    return Landing(flat).bytes.data.cast("B") if flat.numel() else room(0)


def raw(flat: torch.Tensor) -> memoryview:
    """Returns the memory of a flat tensor, or of a contiguous copy, to be read."""
    return bytes_of(flat).data if flat.numel() else room(0)


def is_tensor(value: Any) -> bool:
    """Returns whether the value is a tensor in a file (a `ReadableTensor`)."""
    return hasattr(value, "spec") and hasattr(value, "run")


class Files:
    """Reads files of one checkpoint, by path. The most recently used ones stay open; errors give path and offset.

    on_read: called with the bytes of each read.
    """

    def __init__(self) -> None:
        self._open: dict[Path, tuple[int, int]] = {}
        self.on_read: Callable[[int], None] = lambda _bytes: None

    def __del__(self) -> None:
        self.close()

    def size(self, path: Path) -> int:
        """Returns the file's size in bytes. Raises CheckpointError if there is no such file."""
        return self._file(path)[1]

    def _file(self, path: Path) -> tuple[int, int]:
        found = self._open.pop(path, None)
        if found is None:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
            found = descriptor, os.fstat(descriptor).st_size
        self._open[path] = found
        if len(self._open) > OPEN_LIMIT:
            os.close(self._open.pop(next(iter(self._open)))[0])
        return found

    def read_into(self, path: Path, offset: int, memory: memoryview) -> None:
        """Fills `memory` from the file at `offset` (bytes). Raises CheckpointError if the file is shorter."""
        descriptor, size = self._file(path)
        if offset < 0 or offset + len(memory) > size:
            raise CheckpointError(
                f"{path} has {size} bytes, too few to read bytes {offset} to {offset + len(memory)}: it is truncated or damaged"
            )
        self.on_read(len(memory))
        while memory:
            try:
                count = os.preadv(descriptor, [memory], offset)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read at byte {offset}: {error.strerror}") from error
            if not count:
                raise CheckpointError(f"{path} ended at byte {offset} while it was read")
            memory, offset = memory[count:], offset + count

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Reads a range of bytes. Raises CheckpointError if the file is shorter."""
        if length < 0 or offset + length > self.size(path):
            raise CheckpointError(f"{path} has {self.size(path)} bytes; it should have at least {offset + length}")
        memory = room(length)
        self.read_into(path, offset, memory)
        return bytes(memory)

    def elements(self, path: Path, offset: int, count: int, dtype: str) -> torch.Tensor:
        """Reads a flat tensor of `count` elements from a byte offset."""
        flat = on_host(count, dtype_of(dtype))
        if count:
            self.read_into(path, offset, memory_of(flat))
        return flat

    def close(self) -> None:
        """Closes all files."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()


class ReadableTensor(Protocol):
    """A tensor that can be read by runs."""

    @property
    def spec(self) -> Spec: ...

    def run(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Strided:
    """A tensor in one place of a file. offset: byte of its first element; strides: in elements.

    conjugate, negative: torch's lazy bits of a view, whose file holds the base's values; reads apply both.
    """

    files: Files
    path: Path
    offset: int
    spec: Spec
    strides: tuple[int, ...]
    conjugate: bool = False
    negative: bool = False

    def _resolved(self, values: torch.Tensor) -> torch.Tensor:
        """Applies the lazy bits to values from the file."""
        values = torch.conj_physical(values) if self.conjugate else values
        return torch.neg(values) if self.negative else values

    def _order(self) -> list[int] | None:
        """Returns the dimensions from outermost to innermost in the file; None if the memory is not dense."""
        shape = self.spec.shape
        order = sorted(range(len(shape)), key=lambda dim: (-self.strides[dim], dim) if shape[dim] > 1 else (-math.inf, dim))
        expected = 1
        for dim in reversed(order):
            if shape[dim] > 1 and self.strides[dim] != expected:
                return None
            expected *= shape[dim]
        return order

    def box(self, box: Box) -> torch.Tensor:
        """Reads a box, in its shape."""
        return self._resolved(self._box(box))

    def _box(self, box: Box) -> torch.Tensor:
        order = self._order()
        if order is None:
            rows = self._rows(box[0][0], box[1][0])
            return rows[(slice(None), *(slice(o, o + n) for o, n in zip(box[0][1:], box[1][1:], strict=True)))]
        offsets, sizes = [box[0][dim] for dim in order], [box[1][dim] for dim in order]
        out, width, position = on_host(math.prod(sizes), dtype_of(self.spec.dtype)), self.spec.itemsize, 0
        memory = memory_of(out)
        for start, stop in runs_of_box([self.spec.shape[dim] for dim in order], (tuple(offsets), tuple(sizes))):
            size = (stop - start) * width
            self.files.read_into(self.path, self.offset + start * width, memory[position : position + size])
            position += size
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return out.view(sizes).permute(inverse)

    def _rows(self, first: int, count: int) -> torch.Tensor:
        """Reads indices `[first, first + count)` of the first dimension, and the memory between them."""
        shape = (count, *self.spec.shape[1:])
        span = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, self.strides, strict=True))
        width = self.spec.itemsize
        if span * width > STRIDED_LIMIT:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(self.spec.shape)} with strides {list(self.strides)} spans more than "
                f"{STRIDED_LIMIT} bytes of its file and cannot be read"
            )
        memory = self.files.elements(self.path, self.offset + first * self.strides[0] * width, span, self.spec.dtype)
        return strided(memory, shape, self.strides)

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Reads a run, flat."""
        order = self._order()
        if order is not None and order == sorted(order):
            width = self.spec.itemsize
            return self._resolved(self.files.elements(self.path, self.offset + start * width, stop - start, self.spec.dtype))
        if start == stop:
            return on_host(0, dtype_of(self.spec.dtype))
        return gather(self.spec, [((0,) * len(self.spec.shape), self.spec.shape, lambda: self)], start, stop)


class Boxed(Protocol):
    """A tensor that can be read by boxes."""

    def box(self, box: Box) -> torch.Tensor: ...


Chunk = tuple[tuple[int, ...], tuple[int, ...], Callable[[], Boxed]]
"""Offsets and sizes of a box, and a function that opens it."""


def gather(spec: Spec, chunks: Sequence[Chunk], start: int, stop: int) -> torch.Tensor:
    """Reads a run of a tensor from chunks that tile it."""
    out, position = on_host(stop - start, dtype_of(spec.dtype)), 0
    for box in boxes_of_run(spec.shape, start, stop):
        count = math.prod(box[1])
        piece = out[position : position + count].view(box[1])
        for offsets, sizes, open_chunk in chunks:
            shared = intersection(box, (offsets, sizes))
            if shared is not None:
                within = tuple(low - first for low, first in zip(shared[0], offsets, strict=True))
                place = tuple(slice(low - first, low - first + n) for low, n, first in zip(*shared, box[0], strict=True))
                piece[place] = open_chunk().box((within, shared[1]))
        position += count
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunked:
    """A tensor in chunks that tile it."""

    spec: Spec
    chunks: tuple[Chunk, ...]

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Reads a run, flat."""
        if len(self.chunks) == 1 and isinstance(only := self.chunks[0][2](), Strided):
            return only.run(start, stop)
        return gather(self.spec, self.chunks, start, stop)
