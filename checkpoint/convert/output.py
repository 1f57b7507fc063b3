"""Shared by all targets: writes to a temporary name, renames when all is on disk, and reads the source by runs within a memory budget."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.convert.nested import Leaf
from elastic.checkpoint.pickles.write import Streamed
from elastic.checkpoint.state import Source
from elastic.errors import CheckpointError

ConversionProgress = Callable[[str, int], None]
"""Called with a tensor's name and the number of its bytes that were just written."""

RUN_LIMIT = 4 << 20
"""Most bytes of a run: longer ones are not faster, and take several times the memory (glibc's heap of blocks up to 32 MiB fragments)."""
RUN_LEAST = 64 << 10


def silent(_name: str, _bytes: int) -> None:
    """Reports no progress."""


def silent_bytes(_bytes: int) -> None:
    """Reports no progress."""


def run_bytes(max_memory: int) -> int:
    """Returns the bytes of one run for which source, target and buffers between them stay within `max_memory` (bytes)."""
    return max(RUN_LEAST, min(RUN_LIMIT, max_memory // 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Reads a source by runs, and reports progress. `limit`: bytes of one run."""

    source: Source
    limit: int
    progress: ConversionProgress = silent

    def runs(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """Yields the elements `[start, stop)` of a leaf, by default all."""
        stop = leaf.spec.elements if stop is None else stop
        width = leaf.spec.itemsize
        count = max(1, self.limit // width)
        for at in range(start, stop, count):
            flat = self.source.read(leaf.name, leaf.state, at, min(stop, at + count))
            yield flat
            self.progress(leaf.name, flat.numel() * width)


def streamed(value: Any, reading: Reading, whole: Leaf | None = None, start: int = 0) -> Any:
    """Converts a tree for `pickles.write`: plain dicts, and a `Streamed` for each leaf; equal leaves become one.

    whole, start: the only leaf is the part of `whole` that begins at this element.
    """
    made: dict[Leaf, Streamed] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, Leaf):
            stop = start + value.spec.elements
            return made.setdefault(value, Streamed(spec=value.spec, chunks=lambda: reading.runs(whole or value, start, stop)))
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list) else value

    return convert(value)


def sync(path: Path) -> None:
    """Syncs a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Syncs a file, or a directory and everything in it, to disk."""
    for below in sorted(path.iterdir()) if path.is_dir() else ():
        sync_tree(below)
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Writes or replaces a small file atomically. Raises CheckpointError."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """Raises CheckpointError if writing to `path` would replace something; an empty directory is allowed."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists and is not replaced: choose another path, or remove it")


@contextmanager
def put(path: Path, *, directory: bool) -> Iterator[Path]:
    """Yields a temporary path to write to; it is renamed to `path` when the body ends, and removed if the body raises."""
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if directory:
            partial.mkdir()
        yield partial
        sync_tree(partial)
        refuse_existing(path)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be written: {error.strerror}") from error
    finally:
        if directory:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
