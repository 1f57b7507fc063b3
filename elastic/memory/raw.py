"""Bytes of the host's memory: what links, rounds and files read and write. It does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided

Memory: TypeAlias = "bytes | bytearray | memoryview | np.ndarray"

ALIGNMENT_BYTES = 64
"""Bulk memory, and each tensor inside a message, starts at a multiple of it."""


def padding(size: int) -> int:
    """Bytes from `size` to the next multiple of the alignment."""
    return -size % ALIGNMENT_BYTES


def empty(size: int) -> np.ndarray:
    """Fresh uint8 memory of `size` bytes, uninitialised, that starts at a multiple of 64 bytes."""
    raw = np.empty(size + ALIGNMENT_BYTES, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size]


def zeros(size: int) -> np.ndarray:
    """Fresh uint8 memory of `size` zero bytes; large ones take no memory before they are written to."""
    return np.zeros(size, dtype=np.uint8)


def room(size: int) -> memoryview:
    """Fresh writable memory for what a socket brings."""
    return memoryview(bytearray(size))


def view(buffer: bytes | bytearray | memoryview) -> memoryview:
    """The same memory, to be cut without copying."""
    return memoryview(buffer)


def as_bytes(buffer: Memory) -> np.ndarray:
    """The same memory as a flat uint8 array; nothing is copied. Raises ValueError if it is not C-contiguous."""
    if not isinstance(buffer, np.ndarray):
        return np.frombuffer(buffer, dtype=np.uint8)
    if not buffer.flags.c_contiguous:
        raise ValueError(f"only C-contiguous memory can travel, not strides {buffer.strides} of shape {buffer.shape}")
    return buffer.reshape(-1).view(np.uint8)


def as_writable_bytes(buffer: Memory) -> np.ndarray:
    """As `as_bytes`. Raises ValueError also if the memory is read-only."""
    view = as_bytes(buffer)
    if not view.flags.writeable:
        raise ValueError("cannot receive into read-only memory")
    return view


def typed(memory: Memory, dtype: str | np.dtype, shape: Sequence[int] | None = None) -> np.ndarray:
    """Flat bytes as elements of `dtype`, flat or in `shape`; shares them. Raises ValueError if the sizes do not match."""
    found = (memory if isinstance(memory, np.ndarray) else np.frombuffer(memory, dtype=np.uint8)).view(dtype)
    return found if shape is None else found.reshape(shape)


def little_endian(array: np.ndarray) -> np.ndarray:
    """The array as it travels: little-endian and C-contiguous; itself if it is so already."""
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def rows(memory: np.ndarray, count: int, width: int, pitch: int) -> np.ndarray:
    """`[count, width]` elements of flat memory, rows `pitch` elements apart; shares it. Raises ValueError if it is too short."""
    if count and width and (count - 1) * pitch + width > memory.size:
        raise ValueError(f"{count} rows of {width} elements, {pitch} apart, do not lie in {memory.size} elements")
    return as_strided(memory, (count, width), (pitch * memory.itemsize, memory.itemsize))
