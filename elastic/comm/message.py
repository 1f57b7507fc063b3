"""The format of a message on a link: a header of fixed size, then raw memory.

The header holds a checksum of the memory and one of itself, both CRC-32C, which processors compute at 25 GB/s. It detects every single
flipped bit, every run of up to 32 wrong bits, and all but one in 4 billion of other damages. A message is used only after verification.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from crc32c import crc32c

from elastic.errors import LinkError
from elastic.memory.raw import view

AttemptId: TypeAlias = "tuple[int, int]"
"""(epoch, attempt): compared as a pair, never decreases."""

MAX_BYTES = 1 << 40
_VERSION = int.from_bytes(b"elx2", "little")
"""The initial value of the header's checksum, which so also identifies the protocol."""
_OWN = struct.Struct("<I")
_HEADER = struct.Struct("<IIIQIIIIQ")
HEADER_BYTES = _OWN.size + _HEADER.size
_COLLECTIVE = 1 << 63


class MessageKind(IntEnum):
    """The purpose of a message. `Endpoint.install` sends `HELLO`; its callers send the others."""

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


_KINDS = {int(kind): kind.name.lower().replace("_", " ") for kind in MessageKind}
_ROUNDS = (MessageKind.CONTROL_READY, MessageKind.CONTROL_APPLY)


class Tag(NamedTuple):
    """Identifies a message between two workers within an attempt. The fields are unsigned; `step` has 64 bits, the others have 32."""

    kind: int
    step: int
    a: int = 0
    b: int = 0
    c: int = 0


Key: TypeAlias = "tuple[AttemptId, int, Tag]"
"""The key of a message for its receiver: the attempt, the sender, the tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageHeader:
    """The header of a message; `bytes` is the size of the memory that follows, `checksum` its CRC-32C."""

    attempt_id: AttemptId
    tag: Tag
    bytes: int
    checksum: int = 0

    def pack(self) -> bytes:
        """Returns `HEADER_BYTES` bytes, little-endian. Raises LinkError if a field does not fit."""
        kind, step, a, b, c = self.tag
        try:
            fields = _HEADER.pack(*self.attempt_id, kind, step, a, b, c, self.checksum, self.bytes)
            return _OWN.pack(crc32c(fields, _VERSION)) + fields
        except struct.error as error:
            raise LinkError(f"message {self.tag} of {self.bytes} bytes does not fit its header: {error}") from error

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview) -> MessageHeader:
        """The inverse of `pack`. Raises LinkError if the bytes are no header, or a damaged one."""
        (own,), fields = _OWN.unpack_from(raw), view(raw)[_OWN.size :]
        epoch, attempt, kind, step, a, b, c, checksum, size = _HEADER.unpack(fields)
        if own != crc32c(fields, _VERSION) or size > MAX_BYTES:
            raise LinkError(f"not a message header, or a damaged one: {bytes(raw)!r}")
        return cls(attempt_id=(epoch, attempt), tag=Tag(kind, step, a, b, c), bytes=size, checksum=checksum)


def checksum(memory: memoryview, before: int = 0) -> int:
    """Returns the CRC-32C of `memory`, continued from the checksum `before` of the bytes that precede it."""
    return crc32c(memory, before)


def described(attempt_id: AttemptId, tag: Tag) -> str:
    """Returns a description of a message for users: its kind, epoch, attempt, and step or collective."""
    number = tag.step & ~_COLLECTIVE
    where = f"collective {number}" if tag.step & _COLLECTIVE else f"step {number // 2 if tag.kind in _ROUNDS else number}"
    return f"the {_KINDS.get(tag.kind, f'kind {tag.kind}')} message of epoch {attempt_id[0]}, attempt {attempt_id[1]}, {where}"
