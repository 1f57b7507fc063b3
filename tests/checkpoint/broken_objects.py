"""Saves into an object store, with a fault at one of the calls to fsspec."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import fsspec

from elastic.checkpoint.objects import ObjectStore
from elastic.errors import CheckpointError
from tests.checkpoint import crash_matrix as matrix

CALLS = ("makedirs", "open", "pipe_file", "cat_file", "ls", "info", "rm_file", "rmdir", "modified", "write", "close")


class Died(BaseException):
    """Nothing of the saver runs any more, but what Python does on the way out."""


Fault = Callable[[str], BaseException]


class Breaking:
    """fsspec's file system, or one of its files, with every call counted; some end in a fault before they are made, or half-way."""

    def __init__(self, real: Any, shared: Breaking | None = None) -> None:
        self._real, self._shared = real, shared or self
        self.count, self.torn, self.dead = 0, False, False
        self.faults: Mapping[int, Fault] = {}
        self.kinds: list[str] = []

    def __enter__(self) -> Breaking:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        plain = getattr(self._real, name)
        if name not in CALLS:
            return plain

        def counted(*arguments: Any, **named: Any) -> Any:
            shared = self._shared
            number, shared.count = shared.count, shared.count + 1
            shared.kinds.append(name)
            fault = Died if shared.dead else shared.faults.get(number)
            if fault is not None:
                if shared.torn and not shared.dead and name in ("write", "pipe_file"):
                    data = bytes(arguments[-1])
                    plain(*arguments[:-1], data[: len(data) // 2])
                shared.dead = fault is Died
                raise fault("injected")
            result = plain(*arguments, **named)
            return Breaking(result, shared) if name == "open" else result

        return counted


@contextmanager
def prepared() -> Iterator[str]:
    """A place in fsspec's memory with two checkpoints, for copies."""
    root = f"/{uuid.uuid4().hex}"
    matrix.prepared(ObjectStore(f"memory:/{root}/start"))
    try:
        yield root
    finally:
        fsspec.filesystem("memory").rm(root, recursive=True)


def broken(root: str, faults: Mapping[int, Fault], *, torn: bool = False) -> tuple[str, Breaking]:
    """Runs the save with these faults at its calls; returns what is loaded afterwards."""
    real = fsspec.filesystem("memory")
    if real.exists(f"{root}/run"):
        real.rm(f"{root}/run", recursive=True)
    for path in real.find(f"{root}/start"):
        real.pipe_file(path.replace(f"{root}/start", f"{root}/run"), real.cat_file(path))
    breaking = Breaking(real)
    breaking.faults, breaking.torn = faults, torn
    said = True
    try:
        matrix.the_save(ObjectStore(f"memory:/{root}/run", filesystem=breaking), matrix.WHOLE)
        said = False
    except (CheckpointError, Died):
        pass
    store = ObjectStore(f"memory:/{root}/run")
    return matrix.outcome(store, lambda name: real.rm(f"{root}/run/{name}", recursive=True), must_be_new=not said), breaking


def cells() -> Iterator[tuple[str, str, str]]:
    """`(kind of call, fault, outcome)` at every call."""
    with prepared() as root:
        kinds = broken(root, {})[1].kinds
        for at, kind in enumerate(kinds):
            yield f"objects: {kind}", "EIO", broken(root, {at: OSError})[0]
            yield f"objects: {kind}", "SIGKILL", broken(root, {at: Died})[0]
            if kind in ("write", "pipe_file"):
                yield f"objects: {kind}", "SIGKILL, torn", broken(root, {at: Died}, torn=True)[0]
        for kind, result in dead_in_clean_up(root):
            yield f"objects: {kind}", "EIO, SIGKILL", result


def dead_in_clean_up(root: str) -> Iterator[tuple[str, str]]:
    """Token, manifest or `latest` cannot be written, and what the save made is being removed when the saver dies: at each call of that."""
    for at in [number for number, kind in enumerate(broken(root, {})[1].kinds) if kind == "pipe_file"]:
        kinds = broken(root, {at: OSError})[1].kinds
        for then in range(at + 1, len(kinds)):
            yield kinds[then], broken(root, {at: OSError, then: Died})[0]
