"""Reads and writes Hugging Face directories: `model.safetensors`, or shards and their index, or an adapter; `config.json`. Weights only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.checkpoint.convert.hf_weights import ADAPTER, ADAPTER_CONFIG, INDEX, METADATA, SINGLE, found_in, load_weights
from elastic.checkpoint.convert.nested import Leaf, Nested, ties_of
from elastic.checkpoint.convert.output import ConversionProgress, Reading, put, run_bytes, silent
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.convert.safetensors_file import write_file
from elastic.checkpoint.dtypes import dtype_of
from elastic.checkpoint.plan import is_extra_file
from elastic.checkpoint.state import PARAM, Contents, Source
from elastic.checkpoint.stored import Files
from elastic.checkpoint.strict_json import loads
from elastic.errors import CheckpointError

HEADS = ("lm_head", "embed_out")
"""Modules of transformers whose weights are tied by `tie_word_embeddings`."""
CONFIGS = ("config", "generation_config")
"""Keys of extra values that are `.json` files of their own in this format."""
BESIDE_LIMIT = 64 << 20
"""Most bytes of one extra file; larger files are not read."""
SHARD = 5 << 30
"""Most bytes of weights in one file."""


def recognise(path: Path) -> str | None:
    """Returns why a path is such a directory or file; None if it is not."""
    if path.is_dir() and (name := found_in(path)):
        return f"it has a file {name}"
    return "it is a safetensors file" if path.is_file() and path.suffix == ".safetensors" else None


def read_configs(path: Path, files: Files) -> dict[str, Any]:
    """Reads the configuration files next to the weights, by key."""
    root = path if path.is_dir() else path.parent
    present = {key: root / f"{key}.json" for key in CONFIGS if (root / f"{key}.json").is_file()}
    return {key: loads(files.read(file, 0, files.size(file)), str(file), special_floats=True) for key, file in present.items()}


def read_extra_files(path: Path, files: Files) -> dict[str, bytes]:
    """Reads a model's or tokenizer's other files, unchanged; none for a single file of weights."""
    if not path.is_dir():
        return {}
    names = sorted(file.name for file in path.iterdir() if is_extra_file(file.name) and not file.name.endswith(".index.json"))
    found = {name: path / name for name in names if (path / name).is_file()}
    return {name: files.read(file, 0, files.size(file)) for name, file in found.items() if files.size(file) <= BESIDE_LIMIT}


def files_to_write(contents: Contents) -> dict[str, bytes]:
    """Returns the files to write with the weights: the source's files, and its configurations."""
    values = {f"{key}.json": contents.extra[key] for key in CONFIGS if isinstance(contents.extra.get(key), Mapping)}
    return {**{name: (json.dumps(value, indent=2) + "\n").encode() for name, value in values.items()}, **contents.files}


def open_hf(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Nested:
    """Opens a directory or a file. Raises CheckpointError."""
    files, rules = Files(), rules or Rules()
    try:
        weights = load_weights(path, files, trust=trust_pickle, rules=rules)
        extra = {**read_configs(path, files), **weights.extra}
        others = read_extra_files(path, files)
    except CheckpointError:
        files.close()
        raise
    kept = {name: value for name, value in weights.tensors.items() if not rules.drops(name)}
    ties = ties_of(kept)
    own = {name: value for name, value in kept.items() if name not in ties}
    contents = Contents(
        tensors={name: {PARAM: value.spec} for name, value in own.items()},
        ties=ties,
        buffers=frozenset(name for name, value in own.items() if not dtype_of(value.spec.dtype).is_floating_point),
        extra=extra,
        files=others,
        unread=weights.unread,
    )
    tensors = {(name, PARAM): value for name, value in own.items()}
    return Nested(format="hf", contents=contents, tensors=tensors, files=files, check=weights.check)


def _shards(leaves: Mapping[str, Leaf], limit: int) -> list[dict[str, Leaf]]:
    shards: list[dict[str, Leaf]] = [{}]
    used = 0
    for name, leaf in leaves.items():
        size = leaf.spec.bytes
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = leaf
        used += size
    return shards


def tied_by_config(contents: Contents) -> frozenset[str]:
    """Returns the tied names that are not written: output heads that the model's configuration ties to the input embeddings.

    The configuration does not hold other ties, so their tensors are written under each name.
    """
    config = contents.extra.get("config")
    if config is None and "config.json" in contents.files:
        config = loads(contents.files["config.json"], "config.json", special_floats=True)
    if not (isinstance(config, Mapping) and config.get("tie_word_embeddings", False)):
        return frozenset()
    return frozenset(name for name in contents.ties if name.split(".")[-2:] in ([head, "weight"] for head in HEADS))


def weights_to_write(contents: Contents) -> dict[str, Leaf]:
    """Returns the weights to write by name, with tied names except those of `tied_by_config`."""
    leaves = {name: Leaf(name, PARAM, states[PARAM]) for name, states in contents.tensors.items() if PARAM in states}
    left = tied_by_config(contents)
    return leaves | {name: leaves[target] for name, target in contents.ties.items() if name not in left}


def write_hf(source: Source, path: Path, *, max_memory: int = 1 << 30, progress: ConversionProgress = silent, shard: int = SHARD) -> None:
    """Writes a directory that `from_pretrained` opens if the source has a `config.json`, or a `config` among the extra values.

    Optimizer states are left out. max_memory: bytes. shard: most bytes of weights in one file with several tensors.
    """
    reading = Reading(source=source, limit=run_bytes(max_memory), progress=progress)
    others, metadata = files_to_write(source.contents), source.contents.extra.get(METADATA)
    adapter = ADAPTER_CONFIG in others and "config.json" not in others
    shards = _shards(weights_to_write(source.contents), 1 << 62 if adapter else shard)
    names = (
        [ADAPTER if adapter else SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    with put(path, directory=True) as place:
        for name, leaves in zip(names, shards, strict=True):
            with (place / name).open("wb") as stream:
                write_file(stream, {key: (leaf.spec, reading.runs(leaf)) for key, leaf in _by_alignment(leaves).items()}, metadata)
        if len(shards) > 1:
            total = sum(leaf.spec.bytes for leaves in shards for leaf in leaves.values())
            mapping = {key: name for name, leaves in zip(names, shards, strict=True) for key in leaves}
            (place / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": mapping}, indent=2) + "\n")
        for name, data in others.items():
            (place / name).write_bytes(data)


def _by_alignment(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Sorts wide dtypes first, as the safetensors library does, so that every tensor is aligned to its elements."""
    return dict(sorted(leaves.items(), key=lambda item: -item[1].spec.itemsize))
