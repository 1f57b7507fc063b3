"""Agreements of all members through one of them, the coordinator: a star with two messages per member and round.

`commit` commits a step. Every member sends READY(step); the coordinator decides when all of them have arrived, and sends the decision as
APPLY(step). So APPLY(step) proves that every member was ready, and no member applies a step that another has not finished.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from elastic.comm.endpoint import Endpoint
from elastic.comm.message import MessageKind, Tag
from elastic.errors import LinkError
from elastic.memory.raw import ALIGNMENT_BYTES, Memory, as_bytes, little_endian, typed

Payload: TypeAlias = "tuple[dict[str, Any], Mapping[str, np.ndarray] | None]"
"""A JSON object, and arrays by name (bool, integer, float or complex; None and {} are the same)."""

_LENGTH = struct.Struct("<I")
_PADDING = bytes(ALIGNMENT_BYTES)
_NUMERIC = "biufc"


def encode(payload: Payload) -> list[Memory]:
    """Returns the buffers of one message: u32 length, JSON, then each array's raw little-endian memory, all padded to 64 bytes.

    Raises TypeError if the object is not JSON or an array is not numeric.
    """
    value, arrays = payload
    index: list[tuple[str, str, tuple[int, ...]]] = []
    memory: list[Memory] = []
    for name, array in (arrays or {}).items():
        if array.dtype.kind not in _NUMERIC:
            raise TypeError(f"array {name!r} has dtype {array.dtype}, which cannot be sent: use a numeric dtype")
        little = little_endian(array)
        index.append((name, little.dtype.str, little.shape))
        memory += [little, _PADDING[: -little.nbytes % ALIGNMENT_BYTES]]
    text = json.dumps({"value": value, "arrays": index}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % ALIGNMENT_BYTES)
    return [_LENGTH.pack(len(text)) + text, *memory]


def decode(message: np.ndarray) -> Payload:
    """The inverse of `encode`; the arrays are views of `message` (uint8). Raises LinkError if it holds no payload."""
    try:
        (length,) = _LENGTH.unpack(message[: _LENGTH.size].tobytes())
        start = _LENGTH.size + length
        content = json.loads(message[_LENGTH.size : start].tobytes())
        arrays = {}
        for name, dtype, shape in content["arrays"]:
            size = np.dtype(dtype).itemsize * math.prod(shape)
            arrays[name] = typed(message[start : start + size], dtype, shape)
            start += size + -size % ALIGNMENT_BYTES
        return content["value"], arrays
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise LinkError(f"not a payload: {error}") from error


class Rounds:
    """One member's part in the rounds of an installed attempt. Members other than the coordinator need a link only to it.

    All members must call a method with the same number. The methods raise what `Endpoint.receive` raises.
    """

    def __init__(self, network: Endpoint, worker: int, members: Sequence[int], coordinator: int) -> None:
        self._network = network
        self._worker = worker
        self._others = [member for member in members if member != worker]
        self._coordinator = coordinator

    @property
    def leads(self) -> bool:
        """Whether this worker is the coordinator."""
        return self._worker == self._coordinator

    def commit(self, step: int, ready: Payload, decide: Callable[[dict[int, Payload]], Payload]) -> Payload:
        """Returns on every member the result of `decide`, which the coordinator calls with every member's `ready`, by worker."""
        collected = self._collect(Tag(MessageKind.CONTROL_READY, step), ready)
        return self._spread(Tag(MessageKind.CONTROL_APPLY, step), None if collected is None else decide(collected))

    def gather(self, sequence: int, payload: Payload) -> dict[int, Payload] | None:
        """Returns every member's payload by worker on the coordinator, None on the others."""
        return self._collect(Tag(MessageKind.COLLECT, sequence, 0), payload)

    def broadcast(self, sequence: int, payload: Payload | None) -> Payload:
        """Returns the coordinator's payload on every member; the payloads of the others are ignored."""
        return self._spread(Tag(MessageKind.COLLECT, sequence, 1), payload)

    def _collect(self, tag: Tag, payload: Payload) -> dict[int, Payload] | None:
        buffers = encode(payload)
        if not self.leads:
            self._network.send(self._coordinator, tag, *buffers)
            return None
        collected = {self._worker: decode(_joined(buffers))}
        for member in self._others:
            collected[member] = decode(self._network.receive(member, tag))
        return collected

    def _spread(self, tag: Tag, payload: Payload | None) -> Payload:
        if not self.leads:
            return decode(self._network.receive(self._coordinator, tag))
        if payload is None:
            raise ValueError("the coordinator of a round must pass a payload, not None")
        buffers = encode(payload)
        for member in self._others:
            self._network.send(member, tag, *buffers)
        # Decoded as on the other members: the coordinator must not have a tuple where they have a list.
        return decode(_joined(buffers))


def _joined(buffers: Sequence[Memory]) -> np.ndarray:
    return np.concatenate([as_bytes(buffer) for buffer in buffers])
