"""Reads and writes safetensors headers under strict bounds, and places every tensor's bytes, so that single runs can be read and written.

The format (huggingface/safetensors, README): 8 bytes little-endian length of the header, the header in JSON, then the tensors' bytes
without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.dtypes import itemsize
from elastic.checkpoint.strict_json import dumps, loads
from elastic.errors import CheckpointError

CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
    "complex64": "C64",
}
"""The safetensors name of each dtype of torch."""
_DTYPES = {code: dtype for dtype, code in CODES.items()}

MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""
_ALIGNMENT = 64
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsEntry:
    """One tensor; `[start, stop)` are byte offsets after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """The tensors of a file, in the order of their bytes, which start at byte `data_start`.

    skipped: why tensors were left out, by name.
    """

    entries: tuple[SafetensorsEntry, ...]
    data_start: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def layout_entries(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[SafetensorsEntry, ...]:
    """Places tensors `(name, dtype, shape)` one after another. Raises CheckpointError for a dtype that safetensors does not have."""
    entries: list[SafetensorsEntry] = []
    position = 0
    for name, dtype, shape in tensors:
        if dtype not in CODES:
            raise CheckpointError(f"{name} has dtype {dtype}, which safetensors cannot hold")
        stop = position + math.prod(shape) * itemsize(dtype)
        entries.append(SafetensorsEntry(name=name, dtype=dtype, shape=shape, start=position, stop=stop))
        position = stop
    return tuple(entries)


def encode_header(entries: Iterable[SafetensorsEntry], metadata: Mapping[str, str], where: str) -> bytes:
    """Returns the file's bytes before the first tensor, padded with spaces to a multiple of 64.

    Raises CheckpointError if the header is longer than safetensors permits.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        table[entry.name] = {"dtype": CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]}
    text = dumps(table, where)
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{where}: its header would have {len(text)} bytes; safetensors allows {MAX_HEADER_BYTES}")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(
    read: Callable[[int, int], bytes], size: int, where: str, *, skip: Callable[[str], bool] = lambda _name: False
) -> SafetensorsHeader:
    """Reads the header of a file of `size` bytes; `read(offset, count)` returns bytes of the file.

    skip: whether a tensor of an unknown dtype may be left out; otherwise it raises CheckpointError. Raises CheckpointError, before anything
    large is read, unless the tensors fill the file exactly, without gap or overlap.
    """
    if size < _LENGTH_BYTES:
        raise CheckpointError(f"{where}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
        raise CheckpointError(f"{where}: its header claims {length} bytes; the file has {size}, and {MAX_HEADER_BYTES} is the limit")
    text = read(_LENGTH_BYTES, length)
    table = loads(text, where) if text[:1] == b"{" else None
    if not isinstance(table, dict):
        raise CheckpointError(f"{where}: its header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is not a table of strings")
    found = sorted((_entry(name, fields, where) for name, fields in table.items()), key=lambda entry: (entry.start, entry.stop))
    skipped = {entry.name: f"{where}: {entry.name} has unknown dtype {entry.dtype!r}" for entry in found if entry.dtype not in CODES}
    if refused := [text for name, text in skipped.items() if not skip(name)]:
        raise CheckpointError(refused[0])
    data_start = _LENGTH_BYTES + length
    _check_places(found, size - data_start, where)
    entries = tuple(entry for entry in found if entry.name not in skipped)
    return SafetensorsHeader(entries=entries, data_start=data_start, metadata=metadata, skipped=skipped)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(name: str, fields: Any, where: str) -> SafetensorsEntry:
    """Returns a checked entry; its dtype is the code in the file if it is unknown."""
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: tensor {name!r} must have dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code in CODES:  # torch's names are not codes
        raise CheckpointError(f"{where}: tensor {name!r} has unknown dtype {code!r}")
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or len(shape) > 64:
        raise CheckpointError(f"{where}: tensor {name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where}: tensor {name!r} has impossible offsets")
    dtype = _DTYPES.get(code)
    start, stop = offsets
    if stop < start or (dtype is not None and stop - start != math.prod(shape) * itemsize(dtype)):
        raise CheckpointError(f"{where}: tensor {name!r} of shape {tuple(shape)} and dtype {code} cannot have bytes [{start}, {stop})")
    return SafetensorsEntry(name=name, dtype=dtype or code, shape=tuple(shape), start=start, stop=stop)


def _check_places(entries: Iterable[SafetensorsEntry], size: int, where: str) -> None:
    position = 0
    for entry in entries:
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(f"{where}: tensor {entry.name!r} {what} (it starts at {entry.start}, not {position})")
        position = entry.stop
    if position != size:
        raise CheckpointError(
            f"{where}: its header describes {position} bytes of tensors and the file has {size}: it is truncated or damaged"
        )
