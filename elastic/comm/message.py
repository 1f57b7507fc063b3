"""What travels on a link: a header of fixed size, then raw memory. Also the two ways this package looks at memory."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import numpy as np

from elastic.errors import LinkError

Memory: TypeAlias = "bytes | bytearray | memoryview | np.ndarray"
Era: TypeAlias = "tuple[int, int]"
"""(epoch, attempt): compared as a pair, never goes back."""

ALIGNMENT_BYTES = 64
MAX_BYTES = 1 << 40
_MAGIC = b"elx1"
_HEADER = struct.Struct("<4sIIIQIII4xQ")
HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    """What a message is for. `HELLO` belongs to `Network.install`; the rest to its callers."""

    HELLO = 1
    CONTROL_READY = 2
    CONTROL_APPLY = 3
    ACTIVATION = 4
    GRADIENT = 5
    PARTIAL = 6
    PARAMETER = 7
    COLLECT = 8
    BARRIER = 9
    REPLICA = 10
    TRANSFER = 11
    TRANSFER_DIGEST = 12
    BUFFERS = 13


class Tag(NamedTuple):
    """Names one message between two workers in one epoch and attempt: unsigned, `step` of 64 bits, the others of 32."""

    kind: int
    step: int
    a: int = 0
    b: int = 0
    c: int = 0


Key: TypeAlias = "tuple[Era, int, Tag]"
"""What a receiver waits for: the era, the sender, the tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What precedes the memory of a message; `bytes` is the size of what follows."""

    era: Era
    tag: Tag
    bytes: int

    def pack(self) -> bytes:
        """`HEADER_BYTES` bytes, little-endian. Raises LinkError if a field does not fit."""
        kind, step, a, b, c = self.tag
        try:
            return _HEADER.pack(_MAGIC, *self.era, kind, step, a, b, c, self.bytes)
        except struct.error as error:
            raise LinkError(f"message {self.tag} of {self.bytes} bytes does not fit its header: {error}") from error

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview) -> Header:
        """The inverse of `pack`. Raises LinkError if this is no header."""
        magic, epoch, attempt, kind, step, a, b, c, size = _HEADER.unpack(raw)
        if magic != _MAGIC or size > MAX_BYTES:
            raise LinkError(f"not a message header: {bytes(raw)!r}")
        return cls(era=(epoch, attempt), tag=Tag(kind, step, a, b, c), bytes=size)


def aligned_empty(size: int) -> np.ndarray:
    """Fresh uint8 memory of `size` bytes, uninitialised, that starts at a multiple of 64 bytes."""
    raw = np.empty(size + ALIGNMENT_BYTES, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[start : start + size]


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
