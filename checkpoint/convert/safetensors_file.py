"""Reads safetensors files (headers under strict bounds, values by byte range), and writes them by runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from elastic.checkpoint.files import encode_header, layout_entries, read_header
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Files, Strided, raw


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedHeader:
    """A file's tensors by name, its `__metadata__`, and `skipped` tensors by name, with the reason."""

    tensors: Mapping[str, Strided]
    metadata: Mapping[str, str]
    skipped: Mapping[str, str]


def open_file(path: Path, files: Files, *, skip: Callable[[str], bool] = lambda _name: False) -> ParsedHeader:
    """Reads the header of a file. Raises CheckpointError unless the tensors fill the file exactly.

    skip: whether a tensor of an unknown dtype may be left out; otherwise it raises CheckpointError.
    """
    header = read_header(lambda offset, count: files.read(path, offset, count), files.size(path), str(path), skip=skip)
    found = {
        entry.name: _tensor(path, files, Spec(shape=entry.shape, dtype=entry.dtype), header.data_start + entry.start)
        for entry in header.entries
    }
    return ParsedHeader(tensors=found, metadata=header.metadata, skipped=header.skipped)


def _tensor(path: Path, files: Files, spec: Spec, offset: int) -> Strided:
    strides = tuple(math.prod(spec.shape[dim + 1 :]) for dim in range(len(spec.shape)))
    return Strided(files=files, path=path, offset=offset, spec=spec, strides=strides)


def write_file(
    stream: BinaryIO, tensors: Mapping[str, tuple[Spec, Iterable[torch.Tensor]]], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors from iterables of runs, in the given order. metadata: added to `{"format": "pt"}`, or overrides it."""
    entries = layout_entries((name, spec.dtype, spec.shape) for name, (spec, _) in tensors.items())
    stream.write(encode_header(entries, {"format": "pt", **(metadata or {})}, "a safetensors file"))
    for _, runs in tensors.values():
        for flat in runs:
            stream.write(raw(flat))
