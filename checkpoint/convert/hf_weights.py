"""Finds and reads the weights of a directory as `from_pretrained` does: safetensors or `.bin`, one file or shards, model or adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.safetensors_file import open_file
from elastic.checkpoint.convert.torch_save import load_tree
from elastic.checkpoint.pickles import Archive
from elastic.checkpoint.stored import Files, ReadableTensor, is_tensor
from elastic.checkpoint.strict_json import loads
from elastic.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SETS = (SINGLE, INDEX, BIN, BIN_INDEX, ADAPTER, "adapter_model.bin")
"""The order in which transformers (for the last two, PEFT) looks for weights: it reads the first that exists, and ignores the others."""
METADATA = "safetensors_metadata"
"""The key among the extra values for the metadata of safetensors headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights that were found. tensors: in the order of the files. metadata: of safetensors headers.

    unread: descriptions of data that was not read. ordered: the tensors are in the order of the model's definition.
    check: reads everything again, and returns what that proves, in words.
    """

    tensors: Mapping[str, ReadableTensor]
    check: Callable[[], str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    ordered: bool = False

    @property
    def tree(self) -> dict[str, Any]:
        """The weights as a training checkpoint holds them."""
        return {"model": dict(self.tensors), **self.extra}

    @property
    def extra(self) -> dict[str, Any]:
        """The extra values, by key."""
        return {METADATA: dict(self.metadata)} if self.metadata else {}


def found_in(path: Path) -> str | None:
    """Returns the file of a directory that holds or lists its weights; None if there is none."""
    return next((name for name in SETS if (path / name).is_file()), None)


def load_weights(path: Path, files: Files, *, trust: bool = False, rules: Rules | None = None) -> Weights:
    """Reads the weights of a directory or of a file. Raises CheckpointError if index and files disagree, or there are none."""
    rules = rules or Rules()
    name = path.name if path.is_file() else found_in(path)
    if name is None:
        raise CheckpointError(f"{path} has no weights: looked for {', '.join(SETS)}")
    folder = path.parent if path.is_file() else path
    others = [other for other in SETS if other != name and (path / other).is_file()]
    unread = [f"{other}, because from_pretrained opens {name} instead" for other in others]
    names: dict[str, set[str] | None] = {name: None}
    order: list[str] = []
    if name in (INDEX, BIN_INDEX):
        names, order, more = _indexed(folder / name, files)
        unread += more
    if name == BIN_INDEX or name.endswith(".bin"):
        return _of_torch(folder, names, files, trust, rules, unread)
    weights = _of_safetensors(folder, names, files, rules, unread)
    return replace(weights, tensors={name: weights.tensors[name] for name in order or weights.tensors if name in weights.tensors})


def _indexed(where: Path, files: Files) -> tuple[dict[str, set[str] | None], list[str], list[str]]:
    """Returns the index's tensors by file, all tensors in order, and descriptions of its other metadata."""
    index = loads(files.read(where, 0, files.size(where)), str(where), special_floats=True)
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(file, str) and PurePosixPath(file).name == file for file in mapping.values()):
        raise CheckpointError(f"{where} has no weight_map from names to files in its directory")
    found: dict[str, set[str] | None] = {file: set() for file in sorted(set(mapping.values()))}
    for name, file in mapping.items():
        held = found[file]
        assert held is not None
        held.add(name)
    metadata = index.get("metadata")
    others = sorted(set(metadata) - {"total_size", "total_parameters"}) if isinstance(metadata, dict) else []
    return found, list(mapping), [f"{where.name}: metadata {key!r}" for key in others]


def _check_names(where: Path, wanted: set[str] | None, found: set[str]) -> None:
    if wanted is not None and wanted != found:
        raise CheckpointError(f"{where} and its index disagree about {min(wanted ^ found)}")


def _of_safetensors(folder: Path, names: Mapping[str, set[str] | None], files: Files, rules: Rules, unread: list[str]) -> Weights:
    tensors: dict[str, ReadableTensor] = {}
    metadata: dict[str, str] = {}
    for file, wanted in names.items():
        header = open_file(folder / file, files, skip=lambda name: rules.lenient or rules.drops(name))
        _check_names(folder / file, wanted, {*header.tensors, *header.skipped})
        tensors |= header.tensors
        unread += [text for name, text in header.skipped.items() if not rules.drops(name)]
        for key, value in header.metadata.items():
            if metadata.setdefault(key, value) != value:
                unread.append(f"{file}: metadata {key!r}, which has another value in another file")
    if metadata.get("format") == "pt":
        del metadata["format"]
    return Weights(tensors=tensors, metadata=metadata, unread=tuple(unread), check=lambda: read_all(tensors))


def _of_torch(folder: Path, names: Mapping[str, set[str] | None], files: Files, trust: bool, rules: Rules, unread: list[str]) -> Weights:
    tensors: dict[str, ReadableTensor] = {}
    archives: list[Archive] = []
    for file, wanted in names.items():
        tree, archive = load_tree(folder / file, files, trust_pickle=trust)
        _check_names(folder / file, wanted, set(map(str, tree)))
        archives.append(archive)
        for key, value in tree.items():
            name = str(key)
            if is_tensor(value):
                tensors[name] = value
            elif not rules.drops(name):
                what = f"{folder / file}: {name} is not a tensor; drop it by a rule, drop = ['{re.escape(name)}']"
                if not rules.lenient:
                    raise CheckpointError(what)
                unread.append(what)

    def check() -> str:
        sums = [archive.verify() for archive in archives]
        return f"CRC-32 of {sum(one[0] for one in sums)} bytes agree; {sum(one[1] for one in sums)} bytes have no checksum"

    return Weights(tensors=tensors, unread=tuple(unread), ordered=True, check=check)


def read_all(tensors: Mapping[str, ReadableTensor]) -> str:
    """Reads every byte, and returns what that proves, in words."""
    total = 0
    for value in tensors.values():
        count, step = value.spec.elements, max(1, (4 << 20) // value.spec.itemsize)
        for at in range(0, count, step):
            total += value.run(at, min(count, at + step)).nbytes
    return f"{total} bytes read; the format has no checksums"
