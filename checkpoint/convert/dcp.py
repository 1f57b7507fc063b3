"""torch's distributed checkpoints (DCP): `.metadata`, and `__*_*.distcp` files that hold an archive of `torch.save` per chunk and value."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from checkpoint.convert.archive import Archive
from checkpoint.convert.boxes import tiling_fault
from checkpoint.convert.nested import Nested, interpret
from checkpoint.convert.optimizer import Order
from checkpoint.convert.stored import Chunk, Chunked, Files, Strided, name_of
from checkpoint.convert.tree import place
from checkpoint.convert.unpickle import Record, unpickle
from checkpoint.state import Spec
from elastic.errors import CheckpointError

METADATA = ".metadata"
METADATA_LIMIT = 1 << 30
"""Bytes."""


def recognise(path: Path) -> str | None:
    """Why a path is such a checkpoint, None if it is not."""
    return f"it has a file {METADATA}" if (path / METADATA).is_file() else None


class _Pieces:
    """Where chunks and values lie."""

    def __init__(self, root: Path, files: Files, entries: Mapping[Any, Any], trust: bool) -> None:
        self.root, self.files, self.trust = root, files, trust
        self.places: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in entries.items():
            name, offset = getattr(index, "fqn", None), getattr(index, "offset", None)
            if not isinstance(name, str) or not isinstance(info, Record):
                raise CheckpointError(f"{root / METADATA}: storage_data is not that of torch's file system writer")
            self.places[name, None if offset is None else tuple(offset)] = info

    def archive(self, key: str, offsets: tuple[int, ...] | None) -> Archive:
        info = self.places.get((key, offsets))
        if info is None and offsets is not None and not any(offsets):
            info = self.places.get((key, None))
        if info is None:
            raise CheckpointError(f"{self.root / METADATA} says nothing about where {key} at {offsets} lies")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(f"{key} was written with the stream extensions {list(info.transform_descriptors)}, which are not read")
        relative, begin, length = info.relative_path, info.offset, info.length
        if not isinstance(relative, str) or PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
            raise CheckpointError(f"{self.root / METADATA} places {key} outside of the checkpoint, at {relative!r}")
        if not all(type(number) is int and number >= 0 for number in (begin, length)):
            raise CheckpointError(f"{self.root / METADATA} places {key} at an impossible range")
        return Archive(self.files, self.root / relative, begin, length, trust=self.trust)

    def chunk(self, key: str, spec: Spec, offsets: tuple[int, ...]) -> Strided:
        archive = self.archive(key, offsets)
        value = archive.load()
        if not isinstance(value, Strided) or value.spec != spec:
            found = value.spec if isinstance(value, Strided) else type(value).__name__
            raise CheckpointError(f"{archive.where}: {key} should be {spec.dtype} of {list(spec.shape)}, and is {found}")
        return value

    def verify(self) -> str:
        vouched = bare = 0
        for key, offsets in self.places:
            checked, unchecked = self.archive(key, offsets).verify()
            vouched, bare = vouched + checked, bare + unchecked
        return f"{len(self.places)} archives read; CRC-32 of {vouched} bytes agree; {bare} bytes have no checksum, nor has {METADATA}"


def _tensor(key: str, metadata: Any, pieces: _Pieces) -> Chunked:
    dtype = metadata.properties.state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{pieces.root / METADATA}: {key} has no dtype")
    spec = Spec(shape=tuple(metadata.size), dtype=name_of(dtype))
    boxes = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in metadata.chunks]
    fault = tiling_fault(spec.shape, boxes)
    if fault:
        raise CheckpointError(f"{pieces.root / METADATA}: {key} is not whole: {fault}")
    chunks: list[Chunk] = []
    for offsets, sizes in boxes:
        if math.prod(sizes):
            part = Spec(shape=sizes, dtype=spec.dtype)
            chunks.append((offsets, sizes, functools.cache(functools.partial(pieces.chunk, key, part, offsets))))
    return Chunked(spec=spec, chunks=tuple(chunks))


def _tree(metadata: Any, pieces: _Pieces) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    for key, item in metadata.state_dict_metadata.items():
        path = paths.get(key, (key,))
        if not isinstance(path, tuple) or not path or not all(isinstance(part, str | int) for part in path):
            raise CheckpointError(f"{pieces.root / METADATA}: {key} has the path {path!r}")
        kind = getattr(item, "kind", "")
        if kind == "TensorStorageMetadata":
            place(tree, path, _tensor(key, item, pieces))
        elif kind == "BytesStorageMetadata":
            place(tree, path, pieces.archive(key, None).load())
        else:
            raise CheckpointError(f"{pieces.root / METADATA}: {key} is of an unknown kind")
    return tree


def open_dcp(path: Path, *, trust_pickle: bool = False, order: Order | None = None) -> Nested:
    """Opens a checkpoint directory; values that are no tensors are read now. Raises CheckpointError."""
    files, where = Files(), path / METADATA
    try:
        metadata = unpickle(files.read(where, 0, files.size(where)), where=str(where), trust=trust_pickle)
        if getattr(metadata, "kind", "") != "Metadata" or not isinstance(metadata.storage_data, Mapping):
            raise CheckpointError(f"{where} is not the metadata of a checkpoint that torch's file system writer wrote")
        pieces = _Pieces(path, files, metadata.storage_data, trust_pickle)
        contents, tensors = interpret(_tree(metadata, pieces), order=order or Order())
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        files.close()
        raise CheckpointError(f"{where} has another structure than torch's metadata: {error}") from error
    except CheckpointError:
        files.close()
        raise
    return Nested(format="dcp", contents=contents, tensors=tensors, files=files, check=pieces.verify)
