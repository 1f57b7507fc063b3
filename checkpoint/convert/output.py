"""What every target does: writes beside its place and moves there when all is on disk; reads its source by runs within a budget."""

from __future__ import annotations

import math
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
from elastic.checkpoint.stored import itemsize
from elastic.errors import CheckpointError

ConversionProgress = Callable[[str, int], None]
"""Called with a tensor's name and the bytes of it that were just written."""

RUN_LIMIT = 4 << 20
"""Bytes: longer runs gain nothing, and cost memory several times over (glibc keeps blocks of up to 32 MiB in a heap that fragments)."""
RUN_LEAST = 64 << 10


def silent(_name: str, _bytes: int) -> None:
    """No progress."""


def silent_bytes(_bytes: int) -> None:
    """No progress."""


def run_bytes(max_memory: int) -> int:
    """Bytes of one run such that source, target and what lies between stay within `max_memory` (bytes)."""
    return max(RUN_LEAST, min(RUN_LIMIT, max_memory // 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The runs of a source, with progress. `limit`: bytes of one run."""

    source: Source
    limit: int
    progress: ConversionProgress = silent

    def runs(self, leaf: Leaf, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """The elements `[start, stop)` of a leaf, by default all."""
        stop = math.prod(leaf.spec.shape) if stop is None else stop
        width = itemsize(leaf.spec.dtype)
        count = max(1, self.limit // width)
        for at in range(start, stop, count):
            flat = self.source.read(leaf.name, leaf.state, at, min(stop, at + count))
            yield flat
            self.progress(leaf.name, flat.numel() * width)


def streamed(value: Any, reading: Reading, whole: Leaf | None = None, start: int = 0) -> Any:
    """A tree to write as `pickles.write` wants it: plain dicts, and every leaf as what its runs give; equal leaves are one.

    whole, start: the only leaf is the part of `whole` that begins at this element.
    """
    made: dict[Leaf, Streamed] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, Leaf):
            stop = start + math.prod(value.spec.shape)
            return made.setdefault(value, Streamed(spec=value.spec, chunks=lambda: reading.runs(whole or value, start, stop)))
        if isinstance(value, Mapping):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list) else value

    return convert(value)


def sync(path: Path) -> None:
    """Puts a file or directory onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Puts a file, or a directory with all that is below it, onto the disk."""
    for below in sorted(path.iterdir()) if path.is_dir() else ():
        sync_tree(below)
    sync(path)


def replace_text(path: Path, text: str) -> None:
    """Writes a small file such that a reader sees the old one or the new one. Raises CheckpointError."""
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        beside.write_text(text)
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        beside.unlink(missing_ok=True)


def refuse_existing(path: Path) -> None:
    """CheckpointError if something is at `path` that writing would replace."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists; nothing is replaced, so name another place or remove it")


@contextmanager
def put(path: Path, *, directory: bool) -> Iterator[Path]:
    """A place beside `path` to write at; it becomes `path` when the body ends, and is removed when it raises."""
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if directory:
            beside.mkdir()
        yield beside
        sync_tree(beside)
        refuse_existing(path)
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be written: {error.strerror}") from error
    finally:
        if directory:
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
