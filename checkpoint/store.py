"""Storage for checkpoints: a thin interface over a directory tree, and its local implementation.

Paths are relative to the store's root, with `/`. Every failure of the file system becomes a CheckpointError with the path and the reason.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from elastic.errors import CheckpointError
from elastic.memory import raw

PART = ".part-"
"""Prefix of the names of parts: one worker's bytes of a file, in stores where several workers cannot write into one file."""


class Writable(Protocol):
    """A file that is open for writing; its size was given when it was created."""

    def write(self, memory: np.ndarray, offset: int) -> None:
        """Writes flat uint8 memory at `offset`. Several threads may call it."""
        ...

    def sync(self) -> None:
        """Returns when everything written is on disk."""
        ...

    def close(self) -> None:
        """Closes the file, without sync."""
        ...


class ReadableStore(Protocol):
    """A file that is open for reading."""

    size: int

    def read_into(self, memory: np.ndarray, offset: int) -> None:
        """Fills flat uint8 memory from `offset`. Raises CheckpointError if the file ends too early."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


class Store(Protocol):
    """A tree of files.

    renames: directories can be renamed atomically. shared_writes: several workers may write into one file; else they write parts, and
    `join` makes the file from them. private: no other process sees the store. look_s: seconds between two polls for other workers' files.
    read_bytes: an efficient size of one read.
    """

    renames: bool
    shared_writes: bool
    private: bool
    look_s: float
    read_bytes: int

    def where(self, path: str) -> str:
        """Returns the path or URL for messages."""
        ...

    def make_directory(self, path: str) -> None:
        """Makes a directory, which must not exist, and its parents."""
        ...

    def create(self, path: str, size: int) -> None:
        """Makes a file of this many bytes (zeros until they are written) for `open_write`."""
        ...

    def open_write(self, path: str) -> Writable:
        """Opens a created file."""
        ...

    def join(self, path: str, size: int) -> bool:
        """Makes the file, if it does not exist, from the parts that were written and synced; False while some byte of it is missing."""
        ...

    def open_read(self, path: str) -> ReadableStore:
        """Opens a regular file."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Writes a new file, which must not exist, and syncs it."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Writes or replaces a file atomically: readers see the old or the new content."""
        ...

    def sync_directory(self, path: str) -> None:
        """Returns when the directory's entries are on disk."""
        ...

    def rename(self, old: str, new: str) -> bool:
        """Renames a directory; returns False if the new name exists already, which is never overwritten."""
        ...

    def names(self, path: str) -> list[str]:
        """Returns the sorted entries of a directory; none if there is no such directory."""
        ...

    def size(self, path: str) -> int | None:
        """Returns the bytes of a regular file; None if there is no such file."""
        ...

    def changed(self, path: str) -> float:
        """Returns the time of a file's or directory's last change, in seconds since 1970."""
        ...

    def remove(self, path: str) -> None:
        """Deletes a file, if it exists."""
        ...

    def remove_directory(self, path: str) -> None:
        """Deletes a directory, if it exists and is empty."""
        ...


def read_all(store: Store, path: str, limit: int) -> bytes:
    """Reads a whole file. Raises CheckpointError if it is missing or has more than `limit` bytes."""
    file = store.open_read(path)
    try:
        if file.size > limit:
            raise CheckpointError(f"{store.where(path)}: it has {file.size} bytes, above the limit of {limit}")
        memory = raw.empty(file.size)
        file.read_into(memory, 0)
        return memory.tobytes()
    finally:
        file.close()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


class LocalStore:
    """A directory on this machine, or one that all hosts mount. `calls` is the `os` module, or a test's that injects faults."""

    renames = True
    shared_writes = True
    private = False
    look_s = 0.005
    read_bytes = 512 << 10
    """Small enough to be in the processor's cache still when it is digested."""

    def __init__(self, root: str | os.PathLike[str], *, calls: ModuleType | Any = os) -> None:
        self._root = Path(root).absolute()
        self._os = calls

    def where(self, path: str) -> str:
        return str(self._root / path)

    def make_directory(self, path: str) -> None:
        target = self._root / path
        with _named(target):
            above = target.parent
            missing: list[Path] = []
            while not self._exists(above):
                missing.append(above)
                above = above.parent
            for parent in reversed(missing):
                with suppress(FileExistsError):  # another worker was first
                    self._os.mkdir(parent)
                self._sync_directory(parent.parent)
            self._os.mkdir(target)

    def _exists(self, target: Path) -> bool:
        try:
            self._os.stat(target)
        except FileNotFoundError:
            return False
        return True

    def create(self, path: str, size: int) -> None:
        """Makes a file and reserves its space, so that a full disk is found before anything is written."""
        target = self._root / path
        with _named(target):
            descriptor = self._os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                if size:
                    self._allocate(descriptor, size)
            finally:
                self._os.close(descriptor)

    def _allocate(self, descriptor: int, size: int) -> None:
        try:
            self._os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._os.ftruncate(descriptor, size)

    def open_write(self, path: str) -> LocalWritable:
        target = self._root / path
        with _named(target):
            return LocalWritable(self._os, self._os.open(target, os.O_WRONLY | os.O_CLOEXEC), target)

    def join(self, path: str, size: int) -> bool:
        """Does nothing: workers write into the file itself."""
        return True

    def open_read(self, path: str) -> LocalReadable:
        target = self._root / path
        with _named(target):
            # O_NONBLOCK: a pipe of that name must not hang the reader
            descriptor = self._os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = self._os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                self._os.close(descriptor)
                raise CheckpointError(f"{target}: not a regular file")
            return LocalReadable(self._os, descriptor, target, status.st_size)

    def put(self, path: str, data: bytes) -> None:
        self.create(path, 0)
        file = self.open_write(path)
        try:
            file.write(raw.as_bytes(data), 0)
            file.sync()
        finally:
            file.close()

    def replace(self, path: str, data: bytes) -> None:
        temporary = f".{path}.{os.getpid()}-{os.urandom(4).hex()}"
        try:
            self.put(temporary, data)
            with _named(self._root / path):
                self._os.replace(self._root / temporary, self._root / path)
                self._sync_directory((self._root / path).parent)
        except CheckpointError:
            with suppress(CheckpointError):
                self.remove(temporary)
            raise

    def sync_directory(self, path: str) -> None:
        with _named(self._root / path):
            self._sync_directory(self._root / path)

    def _sync_directory(self, target: Path) -> None:
        descriptor = self._os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._os.fsync(descriptor)
        finally:
            self._os.close(descriptor)

    def rename(self, old: str, new: str) -> bool:
        """Renames a directory. rename(2) never replaces a directory with files in it."""
        with _named(self._root / new):
            try:
                self._os.rename(self._root / old, self._root / new)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    return False
                raise
        return True

    def names(self, path: str) -> list[str]:
        with _named(self._root / path):
            try:
                return sorted(self._os.listdir(self._root / path))
            except FileNotFoundError:
                return []

    def size(self, path: str) -> int | None:
        with _named(self._root / path):
            try:
                status = self._os.stat(self._root / path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return status.st_size if stat.S_ISREG(status.st_mode) else None

    def changed(self, path: str) -> float:
        with _named(self._root / path):
            return self._os.stat(self._root / path).st_mtime

    def remove(self, path: str) -> None:
        with _named(self._root / path), suppress(FileNotFoundError):
            self._os.unlink(self._root / path)

    def remove_directory(self, path: str) -> None:
        with _named(self._root / path):
            try:
                self._os.rmdir(self._root / path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise


class LocalWritable:
    """A file descriptor for writes at given offsets."""

    def __init__(self, calls: Any, descriptor: int, target: Path) -> None:
        self._os, self._descriptor, self._target = calls, descriptor, target

    def write(self, memory: np.ndarray, offset: int) -> None:
        with _named(self._target):
            while memory.size:
                written = self._os.pwrite(self._descriptor, memory.data, offset)
                memory, offset = memory[written:], offset + written

    def sync(self) -> None:
        with _named(self._target):
            self._os.fsync(self._descriptor)

    def close(self) -> None:
        with _named(self._target):
            self._os.close(self._descriptor)


class LocalReadable:
    """A file descriptor for reads at given offsets."""

    def __init__(self, calls: Any, descriptor: int, target: Path, size: int) -> None:
        self._os, self._descriptor, self._target = calls, descriptor, target
        self.size = size

    def read_into(self, memory: np.ndarray, offset: int) -> None:
        with _named(self._target):
            while memory.size:
                count = self._os.preadv(self._descriptor, [memory.data], offset)
                if not count:
                    raise CheckpointError(f"{self._target}: it ends at byte {offset}, {memory.size} bytes too early")
                memory, offset = memory[count:], offset + count

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with _named(self._target):
                self._os.close(descriptor)

    def __del__(self) -> None:
        """Closes the file if its source was not closed."""
        if self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)
