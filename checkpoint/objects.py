"""Checkpoints in object stores, and anywhere else that fsspec reaches: `s3://bucket/run`, `gs://...`, `memory://run`.

Objects are written whole and cannot be renamed, so two things differ from a directory. The manifest, written last, is the commit. A file
that several workers write is made in two steps: every worker uploads its bytes of the file as one object, a *part*; when the parts cover
the file, one worker (each has some of the files) joins them and removes them.

    .part-FILE-TOKEN    runs of bytes one after another; then JSON `[[start, stop], ...]`, its length in 8 bytes, 8 magic bytes

The list of runs is at the end of a part, so an incomplete part is recognized and ignored.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic.checkpoint.store import PART, LocalStore, Store
from elastic.errors import CheckpointError
from elastic.memory.raw import as_bytes

_PART_NAME = re.compile(re.escape(PART) + r"(?P<file>.+)-[0-9a-f]{16}")
_MAGIC = b"\xf9elastic"
_END_BYTES = 8 + len(_MAGIC)
_COPIED_AT_ONCE = 8 << 20
_MOST_RUNS_BYTES = 64 << 20


Location = Path | str
"""A path on this machine (Path), or a URL (str)."""


def place(text: str) -> Location:
    """Parses a path or a URL of a user. `file://` becomes a path, because directories can be renamed and synced there."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


def open_store(where: str | os.PathLike[str]) -> Store:
    """Opens the store at a path or URL. Raises CheckpointError if no installed package can open such URLs."""
    named = place(os.fspath(where))
    return ObjectStore(named) if isinstance(named, str) else LocalStore(named)


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{where}: {error.strerror or error or type(error).__name__}") from error
    except Exception as error:  # a plug-in's boundary: clients of object stores raise errors of any class
        raise CheckpointError(f"{where}: {type(error).__name__}: {error}") from error


def _connected(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the path in it."""
    try:
        return importlib.import_module("fsspec.core").url_to_fs(url)
    except ImportError as error:  # fsspec's message names the package to install
        raise CheckpointError(f"{url}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{url}: {error}; supported are {', '.join(sorted(_protocols()))}") from error
    except Exception as error:  # as in `_named`
        raise CheckpointError(f"{url}: {type(error).__name__}: {error}") from error


def _protocols() -> list[str]:
    return importlib.import_module("fsspec").available_protocols()


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartRun:
    """Bytes `[start, stop)` of a file, at `offset` of a part."""

    start: int
    stop: int
    part: str
    offset: int


class ObjectStore:
    """A prefix of an object store. `filesystem` is fsspec's for this URL, or a test's that records calls and injects faults."""

    renames = False
    shared_writes = False
    look_s = 0.05
    read_bytes = 8 << 20

    def __init__(self, url: str, *, filesystem: Any = None) -> None:
        self._url = url.rstrip("/")
        self._fs, self._root = _connected(self._url) if filesystem is None else (filesystem, filesystem._strip_protocol(self._url))
        self.private = self._url.startswith("memory://")

    def where(self, path: str) -> str:
        return f"{self._url}/{path}" if path else self._url

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _check_bucket(self) -> None:
        """Raises CheckpointError if the bucket is missing: some clients would create it, and its name may be a typing error."""
        above, slash, rest = self._root.partition("/")
        top = above or slash + rest.partition("/")[0]
        if not self.private and not self._fs.exists(top):
            raise CheckpointError(f"{self._url}: there is no {top!r}: create it first, or correct the URL")

    def make_directory(self, path: str) -> None:
        with _named(self.where(path)):
            self._check_bucket()
            self._fs.makedirs(self._at(path), exist_ok=False)

    def create(self, path: str, size: int) -> None:
        """Does nothing: `join` makes the file from its parts."""

    def open_write(self, path: str) -> PartWritable:
        directory, _, name = path.rpartition("/")
        part = f"{directory}/{PART}{name}-{os.urandom(8).hex()}"
        with _named(self.where(part)):
            return PartWritable(self._fs.open(self._at(part), "wb"), self.where(part))

    def open_read(self, path: str) -> ObjectReadable:
        size = self.size(path)
        if size is None:
            raise CheckpointError(f"{self.where(path)}: there is no such file")
        return ObjectReadable(self._fs, self._at(path), self.where(path), size)

    def put(self, path: str, data: bytes) -> None:
        if self.size(path) is not None:
            raise CheckpointError(f"{self.where(path)}: exists already")
        self.replace(path, data)

    def replace(self, path: str, data: bytes) -> None:
        with _named(self.where(path)):
            self._fs.pipe_file(self._at(path), data)

    def join(self, path: str, size: int) -> bool:
        if self.size(path) == size:
            return True
        directory, _, name = path.rpartition("/")
        parts = [f"{directory}/{part}" for part in self.names(directory) if part_of(part) == name]
        runs = sorted((run for part in parts for run in self._runs(part)), key=lambda run: run.start)
        position = 0
        for run in runs:
            if run.start < position:
                raise CheckpointError(f"{self.where(path)}: bytes from {run.start} to {min(run.stop, position)} were written twice")
            if run.start > position:
                return False
            position = run.stop
        if position != size or not parts:
            return False
        with _named(self.where(path)), self._fs.open(self._at(path), "wb") as file:
            for run in runs:
                for at in range(run.offset, run.offset + run.stop - run.start, _COPIED_AT_ONCE):
                    until = min(at + _COPIED_AT_ONCE, run.offset + run.stop - run.start)
                    file.write(self._fs.cat_file(self._at(run.part), start=at, end=until))
        for part in parts:
            self.remove(part)
        return True

    def _runs(self, part: str) -> list[_PartRun]:
        """Returns the runs of a part; an empty list if it is not (yet) complete."""
        size = self.size(part)
        if size is None or size < _END_BYTES:
            return []
        with _named(self.where(part)):
            end = bytes(self._fs.cat_file(self._at(part), start=size - _END_BYTES, end=size))
            length = int.from_bytes(end[:8], "little")
            if end[8:] != _MAGIC or length > min(size - _END_BYTES, _MOST_RUNS_BYTES):
                return []
            text = self._fs.cat_file(self._at(part), start=size - _END_BYTES - length, end=size - _END_BYTES)
        found: list[_PartRun] = []
        offset = 0
        try:
            for start, stop in json.loads(text):
                found.append(_PartRun(start=start, stop=stop, part=part, offset=offset))
                offset += stop - start
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.where(part)}: damaged: its list of runs cannot be read ({error})") from error
        if offset != size - _END_BYTES - length:
            raise CheckpointError(f"{self.where(part)}: damaged: it should hold {offset} bytes")
        return found

    def sync_directory(self, path: str) -> None:
        """Does nothing: an object is durable when its upload has ended."""

    def rename(self, old: str, new: str) -> bool:
        raise CheckpointError(f"{self.where(old)}: objects cannot be renamed")

    def names(self, path: str) -> list[str]:
        with _named(self.where(path)):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._at(path), detail=False)
            except FileNotFoundError:
                self._check_bucket()
                return []
            return sorted({entry.rstrip("/").rpartition("/")[2] for entry in found if entry.rstrip("/") != self._at(path).rstrip("/")})

    def size(self, path: str) -> int | None:
        with _named(self.where(path)):
            self._fs.invalidate_cache()
            try:
                found = self._fs.info(self._at(path))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found["size"] if found["type"] == "file" else None

    def changed(self, path: str) -> float:
        with _named(self.where(path)):
            return self._fs.modified(self._at(path)).timestamp()

    def remove(self, path: str) -> None:
        with _named(self.where(path)), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def remove_directory(self, path: str) -> None:
        if self.names(path):
            return
        with suppress(OSError, NotImplementedError):  # without directories there is nothing to remove
            self._fs.rmdir(self._at(path))


def part_of(name: str) -> str | None:
    """Returns the file that an object of this name is a part of; None if it is not a part."""
    match = _PART_NAME.fullmatch(name)
    return match["file"] if match else None


class PartWritable:
    """One worker's part of a file, streamed to its own object; writes may come in any order."""

    def __init__(self, file: Any, where: str) -> None:
        self._file, self._where = file, where
        self._runs: list[list[int]] = []
        self._lock = threading.Lock()
        self._whole = False

    def write(self, memory: np.ndarray, offset: int) -> None:
        with self._lock, _named(self._where):
            self._file.write(memory.data)
            if self._runs and self._runs[-1][1] == offset:
                self._runs[-1][1] += memory.size
            elif memory.size:
                self._runs.append([offset, offset + memory.size])

    def sync(self) -> None:
        """Ends the upload. The object exists when this returns, and no more can be written."""
        text = json.dumps(self._runs, separators=(",", ":")).encode()
        with self._lock, _named(self._where):
            self._file.write(text + len(text).to_bytes(8, "little") + _MAGIC)
            self._whole = True
            self._file.close()

    def close(self) -> None:
        if not self._whole:
            with suppress(CheckpointError), _named(self._where):  # this may upload an incomplete part, which is ignored and removed
                self._file.close()


class ObjectReadable:
    """An object, read by ranges."""

    def __init__(self, filesystem: Any, path: str, where: str, size: int) -> None:
        self._fs, self._path, self._where, self.size = filesystem, path, where, size

    def read_into(self, memory: np.ndarray, offset: int) -> None:
        if not memory.size:
            return
        with _named(self._where):
            data = self._fs.cat_file(self._path, start=offset, end=offset + memory.size)
        if len(data) != memory.size:
            raise CheckpointError(f"{self._where}: it ends at byte {offset + len(data)}, {memory.size - len(data)} bytes too early")
        memory[:] = as_bytes(data)

    def close(self) -> None:
        """Does nothing: no file is open."""
