"""Adapts our own format to the registry of formats: the newest checkpoint of a directory, or one of its `step-*` directories."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.convert.hf import files_to_write
from elastic.checkpoint.convert.nested import Leaf
from elastic.checkpoint.convert.output import ConversionProgress, Reading, run_bytes, silent
from elastic.checkpoint.objects import Location, place
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import Source
from elastic.errors import CheckpointError

IN_FLIGHT = 4
"""Factor by which a run is smaller than for other targets: the writer holds several at once."""


def _module(name: str) -> Any:
    """Imports a module of our format. Raises CheckpointError if this installation lacks it."""
    try:
        return importlib.import_module(f"elastic.checkpoint.{name}")
    except ModuleNotFoundError as error:
        raise CheckpointError(f"this installation cannot handle our own format: {error}") from error


def recognise(path: Path) -> str | None:
    """Returns why a path is of our format; None if it is not."""
    if (path / "manifest.json").is_file():
        return "it has a file manifest.json"
    if path.is_dir() and any((entry / "manifest.json").is_file() for entry in path.glob("step-*")):
        return "it has directories step-* with a manifest.json"
    return None


def _store(path: Location) -> Any:
    return _module("objects").open_store(path if isinstance(path, str) else path.absolute())


def open_elastic(path: Location) -> Source:
    """Opens one checkpoint, or the newest good one of a directory. Raises CheckpointError."""
    if _store(path).size("manifest.json") is not None:
        above, _, name = str(path if isinstance(path, str) else path.absolute()).rstrip("/").rpartition("/")
        return _module("reader").ElasticSource(_store(place(above)), name)
    source = _module("directory").newest(_store(path))
    if source is None:
        raise CheckpointError(f"{path} has no checkpoint")
    return source


def write_elastic(
    source: Source,
    path: Location,
    *,
    max_memory: int = 1 << 30,
    progress: ConversionProgress = silent,
    slicings: Mapping[tuple[str, str], Slicing] | None = None,
) -> None:
    """Saves into a directory, under the step of the source (0 if it has none); `max_memory` in bytes. `slicings`: by name and state."""
    reading = Reading(source=source, limit=run_bytes(max_memory // IN_FLIGHT), progress=progress)

    def runs() -> Iterator[tuple[str, str, int, torch.Tensor]]:
        for name, states in source.contents.tensors.items():
            for state, spec in states.items():
                at = 0
                for flat in reading.runs(Leaf(name, state, spec)):
                    yield name, state, at, flat
                    at += flat.numel()

    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)
    contents = replace(source.contents, files=files_to_write(source.contents))
    _module("commit").save(_store(path), contents, runs(), step=contents.step or 0, slicings=slicings or {})


def garbage(path: Location, *, older_than_s: float, now: float) -> list[str]:
    """Removes directories of dead saves; see `elastic.checkpoint.directory.collect`."""
    return _module("directory").collect(_store(path), older_than_s=older_than_s, now=now)


def retire(path: Location, *, last: int | None, every: int | None) -> list[str]:
    """Removes checkpoints other than the `last` newest and those of steps that are multiples of `every`; never the last good one."""
    retention = _module("retention")
    policies = ([retention.KeepLast(last)] if last else []) + ([retention.KeepEvery(every)] if every else [])
    return retention.retire(_store(path), policies) if policies else []
