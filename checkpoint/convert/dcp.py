"""Reads torch's distributed checkpoints (DCP): `.metadata`, and `__*_*.distcp` files with a `torch.save` archive per chunk and value."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from elastic.checkpoint.convert.jsonable import Unread
from elastic.checkpoint.convert.nested import Nested, interpret
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.tree import place
from elastic.checkpoint.dtypes import name_of
from elastic.checkpoint.pickles import Archive, Opaque, load_archive, load_bare
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Chunk, Chunked, Files, Strided
from elastic.errors import CheckpointError
from elastic.layout.boxes import tiling_fault

METADATA = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"


def _kind(value: Any) -> str:
    """Returns the name of the class if it is one of torch's metadata, else an empty string."""
    return value.cls.name if isinstance(value, Opaque) and value.cls.module == _CLASSES else ""


def recognise(path: Path) -> str | None:
    """Returns why a path is such a checkpoint; None if it is not."""
    return f"it has a file {METADATA}" if (path / METADATA).is_file() else None


class DcpTensors:
    """Finds and reads the archives of chunks and values."""

    def __init__(self, root: Path, files: Files, entries: Mapping[Any, Any], trust: bool) -> None:
        self.root, self.files, self.trust = root, files, trust
        self.places: dict[tuple[str, tuple[int, ...] | None], Any] = {}
        for index, info in entries.items():
            name, offset = index.attribute("fqn"), index.attribute("offset")
            if not isinstance(name, str) or not isinstance(info, Opaque):
                raise CheckpointError(f"{root / METADATA}: storage_data was not written by torch's file system writer")
            self.places[name, None if offset is None else tuple(offset)] = info

    def archive(self, key: str, offsets: tuple[int, ...] | None) -> Archive:
        info = self.places.get((key, offsets))
        if info is None and offsets is not None and not any(offsets):
            info = self.places.get((key, None))
        if info is None:
            raise CheckpointError(f"{self.root / METADATA} does not list the place of {key} at {offsets}")
        if extensions := info.attribute("transform_descriptors"):
            raise CheckpointError(f"{key} was written with the stream extensions {list(extensions)}, which are not read")
        relative, begin, length = (info.attribute(word) for word in ("relative_path", "offset", "length"))
        if not isinstance(relative, str) or PurePosixPath(relative).is_absolute() or ".." in PurePosixPath(relative).parts:
            raise CheckpointError(f"{self.root / METADATA} places {key} outside the checkpoint, at {relative!r}")
        if not all(type(number) is int and number >= 0 for number in (begin, length)):
            raise CheckpointError(f"{self.root / METADATA} places {key} at an impossible range")
        return Archive(self.root / relative, files=self.files, offset=begin, length=length)

    def value(self, key: str) -> Any:
        return load_archive(self.archive(key, None), trusted=self.trust)

    def chunk(self, key: str, spec: Spec, offsets: tuple[int, ...]) -> Strided:
        archive = self.archive(key, offsets)
        value = load_archive(archive, trusted=self.trust)
        if not isinstance(value, Strided) or value.spec != spec:
            found = value.spec if isinstance(value, Strided) else type(value).__name__
            raise CheckpointError(f"{archive.where}: {key} should be {spec.dtype} of {list(spec.shape)}, but is {found}")
        return value

    def verify(self) -> str:
        checked = bare = 0
        for key, offsets in self.places:
            more, without = self.archive(key, offsets).verify()
            checked, bare = checked + more, bare + without
        return f"{len(self.places)} archives read; CRC-32 of {checked} bytes agree; {bare} bytes have no checksum, nor has {METADATA}"


def tensor(key: str, metadata: Any, pieces: DcpTensors) -> Chunked:
    """Returns a tensor of the metadata. Raises CheckpointError unless its chunks tile it."""
    dtype = metadata.attribute("properties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{pieces.root / METADATA}: {key} has no dtype")
    spec = Spec(shape=tuple(metadata.attribute("size")), dtype=name_of(dtype))
    boxes = [(tuple(chunk.attribute("offsets")), tuple(chunk.attribute("sizes"))) for chunk in metadata.attribute("chunks")]
    fault = tiling_fault(spec.shape, boxes)
    if fault:
        raise CheckpointError(f"{pieces.root / METADATA}: the chunks of {key} do not tile it: {fault}")
    chunks: list[Chunk] = []
    for offsets, sizes in boxes:
        if math.prod(sizes):
            part = Spec(shape=sizes, dtype=spec.dtype)
            chunks.append((offsets, sizes, functools.cache(functools.partial(pieces.chunk, key, part, offsets))))
    return Chunked(spec=spec, chunks=tuple(chunks))


def items(metadata: Any) -> Mapping[str, Any]:
    """Returns the items of the metadata, by key."""
    return metadata.attribute("state_dict_metadata")


def is_described_tensor(item: Any) -> bool:
    """Returns whether an item of the metadata is a tensor; otherwise it is a pickled value."""
    return _kind(item) == "TensorStorageMetadata"


def _tree(metadata: Any, pieces: DcpTensors, rules: Rules) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    planned = metadata.attribute("planner_data")
    paths = planned if isinstance(planned, Mapping) else {}
    for key, item in items(metadata).items():
        path = paths.get(key, (key,))
        if not isinstance(path, tuple) or not path or not all(isinstance(part, str | int) for part in path):
            raise CheckpointError(f"{pieces.root / METADATA}: {key} has the path {path!r}")
        try:
            place(tree, path, _value(key, item, pieces))
        except CheckpointError as error:
            if rules.lenient:
                place(tree, path, Unread(str(error)))
            elif not _is_dropped(path, rules):
                raise
    return tree


def _is_dropped(path: tuple[str | int, ...], rules: Rules) -> bool:
    """Returns whether a rule drops any part of the path: the parameter's name may be any part of it."""
    ends = range(1, len(path) + 1)
    return any(rules.drops(".".join(map(str, path[start:stop]))) for stop in ends for start in range(stop))


def _value(key: str, item: Any, pieces: DcpTensors) -> Any:
    if is_described_tensor(item):
        return tensor(key, item, pieces)
    if _kind(item) == "BytesStorageMetadata":
        return pieces.value(key)
    raise CheckpointError(f"{pieces.root / METADATA}: {key} is an item of an unknown class")


def read_metadata(path: Path, files: Files, *, trust: bool) -> tuple[Any, DcpTensors]:
    """Reads the metadata of a directory; returns it and a reader of its archives. Raises CheckpointError."""
    where = path / METADATA
    metadata = load_bare(where, files=files)
    if _kind(metadata) != "Metadata" or not isinstance(metadata.attribute("storage_data"), Mapping):
        raise CheckpointError(f"{where} is not metadata that torch's file system writer wrote")
    return metadata, DcpTensors(path, files, metadata.attribute("storage_data"), trust)


def read_tree(path: Path, files: Files, *, trust: bool, rules: Rules) -> tuple[dict[str, Any], DcpTensors]:
    """Reads the saved tree, with lazy tensors; unreadable values may be dropped by rules. Raises CheckpointError."""
    try:
        metadata, pieces = read_metadata(path, files, trust=trust)
        return _tree(metadata, pieces, rules), pieces
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path / METADATA} does not have the structure of torch's metadata: {error}") from error


def open_dcp(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Nested:
    """Opens a checkpoint directory, and reads values that are not tensors. Raises CheckpointError."""
    files, rules = Files(), rules or Rules()
    try:
        tree, pieces = read_tree(path, files, trust=trust_pickle, rules=rules)
        contents, tensors = interpret(tree, rules=rules)
    except CheckpointError:
        files.close()
        raise
    return Nested(format="dcp", contents=contents, tensors=tensors, files=files, check=pieces.verify)
