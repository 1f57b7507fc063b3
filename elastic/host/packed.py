"""JSON values that are encoded once, for any number of receivers; whoever passes one on does not decode it."""

from __future__ import annotations

import json
import zlib
from typing import Any

_FAST = 1  # zlib's level: views and proposals become a sixth in milliseconds
_ZLIB = b"x"  # the first byte of every such stream, and of no JSON value


class Packed:
    """A JSON value of a message, which a `Channel` sends behind the message's line. `compressed`: it is sent to many over a network."""

    __slots__ = ("_compressed", "_data", "_value")

    def __init__(self, value: Any, *, compressed: bool = True) -> None:
        self._value, self._data, self._compressed = value, b"", compressed

    @classmethod
    def arrived(cls, data: bytes) -> Packed:
        """Returns the value that is encoded in `data`."""
        packed = cls(None)
        packed._data = data
        return packed

    def encode(self) -> None:
        """Encodes the value now, and not when it is sent first."""
        if not self._data:
            text = json.dumps(self._value).encode()
            self._data = zlib.compress(text, _FAST) if self._compressed else text

    @property
    def data(self) -> bytes:
        """The encoded value, never empty."""
        self.encode()
        return self._data

    @property
    def value(self) -> Any:
        """The value; one that has arrived is decoded for each caller."""
        if self._value is not None or not self._data:
            return self._value
        return json.loads(zlib.decompress(self._data) if self._data.startswith(_ZLIB) else self._data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"Packed({self.value!r})"


def unpacked(value: Any) -> Any:
    """Returns the JSON value of a message's field, which may be packed."""
    return value.value if isinstance(value, Packed) else value
