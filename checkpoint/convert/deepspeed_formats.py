"""Adapts DeepSpeed's formats to the registry of formats."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from elastic.checkpoint.convert.output import ConversionProgress, silent
from elastic.checkpoint.convert.rules import Rules
from elastic.checkpoint.state import Source
from elastic.errors import CheckpointError


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"elastic.checkpoint.convert.{name}")
    except ModuleNotFoundError as error:
        raise CheckpointError(f"this installation cannot handle DeepSpeed's checkpoints: {error}") from error


def _recognise(path: Path, name: str) -> str | None:
    try:
        found = _module("deepspeed").detect(path) if path.is_dir() else None
    except CheckpointError:
        return None
    return "of its files' names" if found == name else None


def recognise_zero(path: Path) -> str | None:
    """Returns why a path is a checkpoint of DeepSpeed's engine, with or without ZeRO; None if it is not."""
    return _recognise(path, "deepspeed")


def recognise_universal(path: Path) -> str | None:
    """Returns why a path is a Universal checkpoint; None if it is not."""
    return _recognise(path, "deepspeed-universal")


def open_deepspeed(path: Path, *, trust_pickle: bool = False, rules: Rules | None = None) -> Source:
    """Opens a checkpoint of either format. Raises CheckpointError."""
    return _module("deepspeed").open_source(path, trusted=trust_pickle, rules=rules)


def write_universal(source: Source, path: Path, *, max_memory: int = 1 << 30, progress: ConversionProgress = silent) -> None:
    """Writes a Universal checkpoint; `max_memory` in bytes."""
    _module("deepspeed_write").write(source, path, max_memory=max_memory, progress=progress)
