"""Simulates what a disk may hold after a power loss: replays recorded calls on a model file system that guarantees only fsync.

A file's bytes are on disk after an fsync of the file; a directory's entries after an fsync of the directory. Before that, each write and
each entry may be present or absent. A rename is atomic.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.checkpoint.recorded_calls import Call

Variant = Literal["least", "entries", "data", "some"]
"""On disk beside what was synced: nothing; all entries; all data; a random part of both."""


@dataclass(eq=False)
class File:
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def after(self, keeps: Callable[[], bool]) -> bytes:
        data = bytearray(self.durable)
        for offset, written in self.pending:
            if keeps():
                data += bytes(max(0, offset + len(written) - len(data)))
                data[offset : offset + len(written)] = written
        return bytes(data)


Entries = dict[str, "File | Directory"]


@dataclass(eq=False)
class Directory:
    durable: Entries = field(default_factory=dict)
    now: Entries = field(default_factory=dict)
    pending: list[dict[str, File | Directory | None]] = field(default_factory=list)
    """Changes of entries that belong together; None is a removal."""

    def change(self, changes: dict[str, File | Directory | None]) -> None:
        self.pending.append(changes)
        _apply(self.now, changes)

    def after(self, keeps: Callable[[], bool]) -> Entries:
        entries = dict(self.durable)
        for changes in self.pending:
            if keeps():
                _apply(entries, changes)
        return entries


def _apply(entries: Entries, changes: dict[str, File | Directory | None]) -> None:
    for name, node in changes.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Disk:
    """Starts with what is under `root`, all of it on disk, and follows calls."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tree = _loaded(root)
        self._descriptors: dict[int, File | Directory] = {}

    def _find(self, path: Path) -> tuple[Directory, str]:
        directory = self._tree
        parts = path.relative_to(self._root).parts
        for part in parts[:-1]:
            below = directory.now[part]
            assert isinstance(below, Directory)
            directory = below
        return directory, parts[-1]

    def follow(self, call: Call) -> None:
        follow = getattr(self, f"_{call.kind}", None)
        if follow is not None:
            follow(call)

    def _open(self, call: Call) -> None:
        path, flags = call.arguments[:2]
        if path == self._root:
            self._descriptors[call.result] = self._tree
            return
        if self._root not in path.parents:
            return
        directory, name = self._find(path)
        if flags & os.O_CREAT:
            directory.change({name: File()})
        self._descriptors[call.result] = directory.now[name]

    def _close(self, call: Call) -> None:
        self._descriptors.pop(call.arguments[0], None)

    def _mkdir(self, call: Call) -> None:
        directory, name = self._find(call.arguments[0])
        directory.change({name: Directory()})

    def _posix_fallocate(self, call: Call) -> None:
        self._pwrite(Call("pwrite", (call.arguments[0], bytes(call.arguments[2]), 0)))

    def _pwrite(self, call: Call) -> None:
        descriptor, data, offset = call.arguments
        file = self._descriptors[descriptor]
        assert isinstance(file, File)
        file.pending.append((offset, data))

    def _fsync(self, call: Call) -> None:
        node = self._descriptors[call.arguments[0]]
        if isinstance(node, File):
            node.durable = node.after(lambda: True)
        else:
            node.durable = dict(node.now)
        node.pending.clear()

    def _rename(self, call: Call) -> None:
        old, new = map(self._find, call.arguments)
        assert old[0] is new[0]
        old[0].change({new[1]: old[0].now[old[1]], old[1]: None})

    _replace = _rename

    def _unlink(self, call: Call) -> None:
        directory, name = self._find(call.arguments[0])
        directory.change({name: None})

    _rmdir = _unlink

    def crash(self, target: Path, variant: Variant, seed: int) -> None:
        """Writes what such a crash leaves under `target`."""
        chance = random.Random(seed)
        some = lambda: chance.random() < 0.5  # noqa: E731
        entries = {"least": lambda: False, "entries": lambda: True, "data": lambda: False, "some": some}[variant]
        data = {"least": lambda: False, "entries": lambda: False, "data": lambda: True, "some": some}[variant]
        _write(self._tree, target, entries, data)


def _loaded(path: Path) -> Directory:
    entries: Entries = {child.name: _loaded(child) if child.is_dir() else File(child.read_bytes()) for child in path.iterdir()}
    return Directory(dict(entries), entries)


def _write(directory: Directory, target: Path, entries: Callable[[], bool], data: Callable[[], bool]) -> None:
    target.mkdir()
    for name, node in directory.after(entries).items():
        if isinstance(node, Directory):
            _write(node, target / name, entries, data)
        else:
            (target / name).write_bytes(node.after(data))


def successful(calls: Sequence[Call]) -> list[Call]:
    """Calls that did something; an open that failed did not."""
    return [call for call in calls if call.kind != "open" or call.result is not None]
