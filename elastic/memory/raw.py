"""Bytes of host memory that links, rounds and files read and write. It does not import torch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TypeAlias

import numpy as np
from crc32c import crc32c
from numpy.lib.stride_tricks import as_strided

Memory: TypeAlias = "bytes | bytearray | memoryview | np.ndarray"

ALIGNMENT_BYTES = 64
"""Bulk memory, and each tensor inside a message, starts at a multiple of this."""


def padding(size: int) -> int:
    """Returns the bytes from `size` to the next multiple of the alignment."""
    return -size % ALIGNMENT_BYTES


def empty(size: int) -> np.ndarray:
    """Allocates `size` bytes (uint8), uninitialised, that start at a multiple of 64 bytes."""
    raw = np.empty(size + ALIGNMENT_BYTES, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size]


def zeros(size: int) -> np.ndarray:
    """Allocates `size` zero bytes (uint8); a large array takes no memory until it is written to."""
    return np.zeros(size, dtype=np.uint8)


def room(size: int) -> memoryview:
    """Allocates a writable buffer of `size` bytes to receive into from a socket."""
    return memoryview(bytearray(size))


def give_back() -> None:
    """Returns memory that was freed to the system, if the process's allocator keeps some and can do so (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def view(buffer: bytes | bytearray | memoryview) -> memoryview:
    """Returns a view of the same memory that can be sliced without copying."""
    return memoryview(buffer)


def as_bytes(buffer: Memory) -> np.ndarray:
    """Returns the same memory as a flat uint8 array, without copying. Raises ValueError if it is not C-contiguous."""
    if not isinstance(buffer, np.ndarray):
        return np.frombuffer(buffer, dtype=np.uint8)
    if not buffer.flags.c_contiguous:
        raise ValueError(f"only C-contiguous memory can be sent or received, not strides {buffer.strides} of shape {buffer.shape}")
    return buffer.reshape(-1).view(np.uint8)


def as_writable_bytes(buffer: Memory) -> np.ndarray:
    """Returns the same as `as_bytes`. Raises ValueError also if the memory is read-only."""
    view = as_bytes(buffer)
    if not view.flags.writeable:
        raise ValueError("cannot receive into read-only memory")
    return view


def typed(memory: Memory, dtype: str | np.dtype, shape: Sequence[int] | None = None) -> np.ndarray:
    """Returns flat bytes as elements of `dtype`, flat or in `shape`; shares the memory. Raises ValueError if the sizes do not match."""
    found = (memory if isinstance(memory, np.ndarray) else np.frombuffer(memory, dtype=np.uint8)).view(dtype)
    return found if shape is None else found.reshape(shape)


def little_endian(array: np.ndarray) -> np.ndarray:
    """Returns the array in the form in which it is sent, little-endian and C-contiguous; the array itself if it is so already."""
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def rows(memory: np.ndarray, count: int, width: int, pitch: int) -> np.ndarray:
    """Returns `[count, width]` elements of flat memory, rows `pitch` elements apart; shares it. Raises ValueError if it is too short."""
    if count and width and (count - 1) * pitch + width > memory.size:
        raise ValueError(f"{count} rows of {width} elements, {pitch} apart, do not fit into {memory.size} elements")
    return as_strided(memory, (count, width), (pitch * memory.itemsize, memory.itemsize))


def checksum(memory: np.ndarray) -> str:
    """Returns the CRC-32C of contiguous bytes (uint8) as 8 hex digits, to detect changes of the same memory; twice as fast as
    `memory.digest.digest`.

    It detects every flip of up to three bits among 2**31 - 1, 268 MB (Koopman's tables of CRC polynomials: 0x1EDC6F41 has Hamming distance
    4), and all but one in 2**32 of other changes.
    """
    return f"{crc32c(memory.data):08x}"


def checksum_of(memories: Iterable[np.ndarray]) -> str:
    """Returns the `checksum` of the bytes of several arrays, one behind the other."""
    found = 0
    for memory in memories:
        found = crc32c(memory.data, found)
    return f"{found:08x}"
