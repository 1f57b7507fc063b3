"""Reads safetensors files (headers under strict bounds, values by byte range), and writes them by runs."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Files, Strided, itemsize, raw
from elastic.errors import CheckpointError

HEADER_LIMIT = 100_000_000
"""Most bytes of a header: the limit of the safetensors library itself."""

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_CODES = {name: code for code, name in DTYPES.items()}


def strict_json(data: bytes, where: str) -> Any:
    """Parses JSON without repeated keys. Raises CheckpointError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise CheckpointError(f"{where}: a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(data.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedHeader:
    """A file's tensors by name, its `__metadata__`, and `skipped` tensors by name, with the reason."""

    tensors: dict[str, Strided]
    metadata: dict[str, str]
    skipped: dict[str, str]


def read_header(path: Path, files: Files, *, skip: Callable[[str], bool] = lambda _name: False) -> ParsedHeader:
    """Reads the header. Raises CheckpointError unless the tensors fill the file exactly.

    skip: whether a tensor of an unknown dtype may be left out; otherwise it raises CheckpointError.
    """
    size = files.size(path)
    length = struct.unpack("<Q", files.read(path, 0, 8))[0] if size >= 8 else -1
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise CheckpointError(f"{path} is not a safetensors file, or it is truncated: its header should have {length} bytes")
    header = strict_json(files.read(path, 8, length), f"the header of {path}")
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"the __metadata__ in the header of {path} is not a table of strings")
    spans = {name: _span(name, entry, path) for name, entry in header.items()}
    skipped = {name: f"{path}: {name} has dtype {code}, which is not supported" for name, (code, *_) in spans.items() if code not in DTYPES}
    if refused := [text for name, text in skipped.items() if not skip(name)]:
        raise CheckpointError(refused[0])
    position = 0
    for name, (code, shape, begin, end) in sorted(spans.items(), key=lambda item: item[1][2:]):
        if begin != position or (code in DTYPES and end - begin != math.prod(shape) * itemsize(DTYPES[code])):
            raise CheckpointError(f"{path}: tensor {name} of {code} {list(shape)} lies at {begin} to {end}; it should begin at {position}")
        position = end
    if 8 + length + position != size:
        raise CheckpointError(f"{path} has {size} bytes, but its header describes {8 + length + position}: it is truncated or damaged")
    found = {
        name: _tensor(path, files, Spec(shape=shape, dtype=DTYPES[code]), 8 + length + begin)
        for name, (code, shape, begin, _) in spans.items()
        if code in DTYPES
    }
    return ParsedHeader(tensors=found, metadata=metadata, skipped=skipped)


def _span(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Returns an entry's dtype code, shape, and the offsets of its first byte and its end after the header."""
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(number) is int and 0 <= number < 1 << 60 for number in (*shape, begin, end)
        ):
            return code, tuple(shape), begin, end
    raise CheckpointError(f"the header of {path} describes tensor {name!r} in an unknown way")


def _tensor(path: Path, files: Files, spec: Spec, offset: int) -> Strided:
    strides = tuple(math.prod(spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
    return Strided(files=files, path=path, offset=offset, spec=spec, strides=strides)


def write_file(
    stream: BinaryIO, tensors: Mapping[str, tuple[Spec, Iterable[torch.Tensor]]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors from iterables of runs, in the given order. metadata: added to `{"format": "pt"}`, or overrides it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, (spec, _) in tensors.items():
        if spec.dtype not in _CODES:
            raise CheckpointError(f"{name} has dtype {spec.dtype}, which safetensors cannot hold")
        end = position + math.prod(spec.shape) * itemsize(spec.dtype)
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for _, runs in tensors.values():
        for flat in runs:
            stream.write(raw(flat))
