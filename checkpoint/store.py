"""Where checkpoints lie: a thin interface over a directory tree, and its local implementation.

Paths are relative to the store's root, with `/`. Every failure of the file system becomes a CheckpointError that names the path and the
reason.
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
"""Begins the name of what one worker wrote of a file, where several cannot write into it."""


class Writable(Protocol):
    """A file that is open for writing; its size was given when it was created."""

    def write(self, memory: np.ndarray, offset: int) -> None:
        """Puts flat uint8 memory at `offset`. Several threads may."""
        ...

    def sync(self) -> None:
        """Returns when all that was written is on disk."""
        ...

    def close(self) -> None:
        """Lets go of it, without sync."""
        ...


class ReadableStore(Protocol):
    """A file that is open for reading."""

    size: int

    def read_into(self, memory: np.ndarray, offset: int) -> None:
        """Fills flat uint8 memory from `offset`. Raises CheckpointError if the file ends before."""
        ...

    def close(self) -> None:
        """Lets go of it."""
        ...


class Store(Protocol):
    """A tree of files.

    renames: a directory can be renamed at once. shared_writes: several workers may write one file at its places; else what is written
    are parts, of which `join` makes the file. private: no other process sees it. look_s: seconds between two looks for what others make.
    read_bytes: of one good read.
    """

    renames: bool
    shared_writes: bool
    private: bool
    look_s: float
    read_bytes: int

    def where(self, path: str) -> str:
        """How to name the path to a person."""
        ...

    def make_directory(self, path: str) -> None:
        """Makes it, and what is above it; it must not exist."""
        ...

    def create(self, path: str, size: int) -> None:
        """Makes a file of this many bytes (zeros, as long as nobody writes them) for `open_write`."""
        ...

    def open_write(self, path: str) -> Writable:
        """Opens a created file."""
        ...

    def join(self, path: str, size: int) -> bool:
        """Makes the file of the parts that were written and synced, if it is not there; False while some byte of it is missing."""
        ...

    def open_read(self, path: str) -> ReadableStore:
        """Opens a regular file."""
        ...

    def put(self, path: str, data: bytes) -> None:
        """Makes a whole new file and syncs it; it must not exist."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Makes or replaces a file at once: readers see the old or the new content."""
        ...

    def sync_directory(self, path: str) -> None:
        """Returns when the directory's entries are on disk."""
        ...

    def rename(self, old: str, new: str) -> bool:
        """Renames a directory; False if there is something of that name already. Never overwrites."""
        ...

    def names(self, path: str) -> list[str]:
        """Sorted entries of a directory; none if there is no such directory."""
        ...

    def size(self, path: str) -> int | None:
        """Bytes of a regular file; None if there is none."""
        ...

    def changed(self, path: str) -> float:
        """When a file or directory was last changed, in seconds since 1970."""
        ...

    def remove(self, path: str) -> None:
        """Deletes a file; nothing happens if it is gone."""
        ...

    def remove_directory(self, path: str) -> None:
        """Deletes an empty directory; nothing happens if it is gone or not empty."""
        ...


def read_all(store: Store, path: str, limit: int) -> bytes:
    """A whole file. Raises CheckpointError if it is missing or has more than `limit` bytes."""
    file = store.open_read(path)
    try:
        if file.size > limit:
            raise CheckpointError(f"{store.where(path)}: {file.size} bytes are more than the {limit} that it may have")
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
    """A directory of this machine, or one that all hosts mount. `calls` is the `os` module, or one that records and breaks."""

    renames = True
    shared_writes = True
    private = False
    look_s = 0.005
    read_bytes = 512 << 10
    """Still in the processor's cache when they are digested."""

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
        """Space is taken now, so that a full disk is found before anything is written."""
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
        """All parts are in the file already."""
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
        beside = f".{path}.{os.getpid()}-{os.urandom(4).hex()}"
        try:
            self.put(beside, data)
            with _named(self._root / path):
                self._os.replace(self._root / beside, self._root / path)
                self._sync_directory((self._root / path).parent)
        except CheckpointError:
            with suppress(CheckpointError):
                self.remove(beside)
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
        """A directory with files in it is never replaced by rename(2)."""
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
    """A file descriptor; writes go to their places independently of each other."""

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
    """A file descriptor."""

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
        """Whoever forgets a source does not keep its files."""
        if self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)
