"""Writes checkpoints for `torch.distributed.checkpoint.load`: one `.distcp` file of archives, and `.metadata`.

The optimizer's groups are written under both kinds of keys (`param_groups.0.lr`, and flattened `param_groups.NAME.lr`); the keys of its
states are the same strings for both. So a load finds its keys with any options of `get_optimizer_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from elastic.checkpoint.convert.dcp_metadata import bytes_entry, metadata_bytes, tensor_entry
from elastic.checkpoint.convert.nested import Leaf, tree_of
from elastic.checkpoint.convert.output import ConversionProgress, Reading, put, run_bytes, silent, streamed
from elastic.checkpoint.convert.tree import element
from elastic.checkpoint.dtypes import name_of
from elastic.checkpoint.pickles.write import write_archive
from elastic.checkpoint.state import Source, Spec
from elastic.errors import CheckpointError

CHUNK = 64 << 20
"""Bytes of a chunk, but at least one row: torch's reader loads one chunk at a time."""

DATA = "__0_0.distcp"

Item = tuple[tuple[str | int, ...], Any]


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[Item]:
    """Flattens a value as DCP's planner does: dicts, and lists that hold tensors or dicts."""
    if isinstance(value, Mapping):
        return [item for key, inner in value.items() for item in leaves(inner, (*path, str(key)))]
    if isinstance(value, list) and _is_apart(value):
        return [item for index, inner in enumerate(value) for item in leaves(inner, (*path, index))]
    return [(path, value)]


def _is_apart(items: Sequence[Any]) -> bool:
    return any(isinstance(item, Mapping | Leaf | torch.Tensor) or (isinstance(item, list) and _is_apart(item)) for item in items)


def _flattened_groups(optimizer: Mapping[str, Any], path: tuple[str | int, ...]) -> list[Item]:
    return [
        ((*path, f"param_groups.{name}.{key}"), value)
        for group in optimizer["param_groups"]
        for name in group["params"]
        for key, value in group.items()
        if key != "params"
    ]


def _chunks(spec: Spec) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    if not spec.shape or not spec.elements:
        return [((0,) * len(spec.shape), spec.shape)]
    rows = max(1, CHUNK // (math.prod(spec.shape[1:]) * spec.itemsize))
    zeros, tail = (0,) * (len(spec.shape) - 1), spec.shape[1:]
    return [((row, *zeros), (min(rows, spec.shape[0] - row), *tail)) for row in range(0, spec.shape[0], rows)]


class _Writer:
    def __init__(self, stream: BinaryIO, reading: Reading) -> None:
        self.stream, self.reading = stream, reading
        self.items: dict[str, Any] = {}
        self.places: list[tuple[Any, str, int, int]] = []
        self.paths: dict[str, tuple[str | int, ...]] = {}

    def add(self, path: tuple[str | int, ...], value: Any) -> None:
        key = ".".join(map(str, path))
        if key in self.items:
            raise CheckpointError(f"two values would have the key {key} in DCP; rename one by a rule")
        self.paths[key] = path
        if isinstance(value, Leaf):
            self._tensor(key, value)
        elif isinstance(value, torch.Tensor):
            spec = Spec(shape=tuple(value.shape), dtype=name_of(value.dtype))
            self.items[key] = tensor_entry(spec, _chunks(spec))
            self._archive((key, (0,) * value.dim(), 0), value)
        else:
            self.items[key] = bytes_entry()
            self._archive((key, None, None), value)

    def _tensor(self, key: str, leaf: Leaf) -> None:
        self.items[key] = tensor_entry(leaf.spec, _chunks(leaf.spec))
        for index, (offsets, sizes) in enumerate(_chunks(leaf.spec)):
            start = sum(offset * math.prod(leaf.spec.shape[dim + 1 :]) for dim, offset in enumerate(offsets))
            part = Leaf(leaf.name, leaf.state, Spec(shape=sizes, dtype=leaf.spec.dtype))
            self._archive((key, offsets, index), part, leaf, start)

    def _archive(self, index: Any, value: Any, leaf: Leaf | None = None, start: int = 0) -> None:
        begin = self.stream.tell()
        write_archive(self.stream, streamed(value, self.reading, leaf, start))
        self.places.append((index, DATA, begin, self.stream.tell() - begin))

    def metadata(self) -> bytes:
        return metadata_bytes(self.items, self.paths, self.places)


def write_dcp(source: Source, path: Path, *, max_memory: int = 1 << 30, progress: ConversionProgress = silent) -> None:
    """Writes a directory; `max_memory` in bytes. The keys of model and optimizer are the source's, else `model` and `optim`."""
    tree, optimizer = tree_of(source, model="model", optimizer="optim", numbered=False)
    items = leaves(tree)
    if source.contents.groups:
        known = {".".join(map(str, at)) for at, _ in items}
        items += [item for item in _flattened_groups(element(tree, optimizer), optimizer) if ".".join(map(str, item[0])) not in known]
    reading = Reading(source=source, limit=run_bytes(max_memory), progress=progress)
    with put(path, directory=True) as place:
        with (place / DATA).open("wb") as stream:
            writer = _Writer(stream, reading)
            for at, value in items:
                writer.add(at, value)
        (place / ".metadata").write_bytes(writer.metadata())
