"""A save into an object store, broken at the calls that it makes of fsspec."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from checkpoint.objects import ObjectStore
from elastic.errors import CheckpointError
from tests.checkpoint import crash_matrix as matrix

CALLS = ("makedirs", "open", "pipe_file", "cat_file", "ls", "info", "rm_file", "rmdir", "modified", "write", "close")


class Died(BaseException):
    """Nothing of the saver runs any more, but what Python does on the way out."""


class Breaking:
    """fsspec's file system, or one of its files, with every call counted; `fault` happens at call `at`, before it is made, or half-way."""

    def __init__(self, real: Any, shared: Breaking | None = None) -> None:
        self._real, self._shared = real, shared or self
        self.count, self.at, self.fault, self.torn = 0, -1, None, False
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
            if shared.dead or number == shared.at:
                if shared.torn and not shared.dead and name in ("write", "pipe_file"):
                    data = bytes(arguments[-1])
                    plain(*arguments[:-1], data[: len(data) // 2])
                shared.dead = shared.fault is Died
                raise shared.fault("injected")
            result = plain(*arguments, **named)
            return Breaking(result, shared) if name == "open" else result

        return counted

    dead = False


@contextmanager
def prepared() -> Iterator[str]:
    """A place in fsspec's memory with two checkpoints, for copies."""
    root = f"/{uuid.uuid4().hex}"
    matrix.prepared(ObjectStore(f"memory:/{root}/start"))
    try:
        yield root
    finally:
        fsspec.filesystem("memory").rm(root, recursive=True)


def broken(root: str, at: int, fault: Callable[[str], BaseException], *, torn: bool = False) -> tuple[str, Breaking]:
    """What is loaded when that happens at that call of the save."""
    real = fsspec.filesystem("memory")
    if real.exists(f"{root}/run"):
        real.rm(f"{root}/run", recursive=True)
    for path in real.find(f"{root}/start"):
        real.pipe_file(path.replace(f"{root}/start", f"{root}/run"), real.cat_file(path))
    breaking = Breaking(real)
    breaking.at, breaking.fault, breaking.torn = at, fault, torn
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
        kinds = broken(root, -1, OSError)[1].kinds
        for at, kind in enumerate(kinds):
            yield f"objects: {kind}", "EIO", broken(root, at, OSError)[0]
            yield f"objects: {kind}", "SIGKILL", broken(root, at, Died)[0]
            if kind in ("write", "pipe_file"):
                yield f"objects: {kind}", "SIGKILL, torn", broken(root, at, Died, torn=True)[0]
