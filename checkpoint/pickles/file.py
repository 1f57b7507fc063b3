"""Loads a file of `torch.save` by the restricted interpreter or, if the user trusts it, by Python's own unpickler."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoint.dtypes import name_of
from elastic.checkpoint.pickles.archive import Archive
from elastic.checkpoint.pickles.calls import STORAGES, TENSORS, call, storage
from elastic.checkpoint.pickles.machine import run
from elastic.checkpoint.pickles.origin import Origin, PickleLimits
from elastic.checkpoint.pickles.values import Global
from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import Files
from elastic.errors import CheckpointError

_FAULTS = (OSError, RuntimeError, ValueError, TypeError, EOFError, ImportError, AttributeError, LookupError, pickle.UnpicklingError)
"""Exceptions that damaged or foreign pickles raise when they are run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A tensor that torch has loaded into memory."""

    tensor: torch.Tensor

    @property
    def spec(self) -> Spec:
        """The tensor's shape and dtype."""
        return Spec(shape=tuple(self.tensor.shape), dtype=name_of(self.tensor.dtype))

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Returns a run, flat, as a copy."""
        return self.tensor.detach().resolve_conj().resolve_neg().reshape(-1)[start:stop].clone()


class _Trusting(pickle.Unpickler):
    """Runs a pickle with all its imports and calls; tensors still stay in their file."""

    def __init__(self, origin: Origin, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.origin = origin

    def find_class(self, module: str, name: str) -> Any:
        known = Global(module, name)
        if (module, name) in TENSORS:
            return lambda *args: call(self.origin, known, args)
        if module in ("torch", "torch.storage") and name in STORAGES:
            return known
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return storage(self.origin, pid)


def load_archive(archive: Archive, *, trusted: bool = False) -> Any:
    """Loads the object of an archive, with lazy tensors. Raises CheckpointError with the file and the reason."""
    data = archive.whole("data.pkl", archive.limits.pickle_bytes)
    if not trusted:
        return run(archive, data)
    try:
        return _Trusting(archive, data).load()
    except _FAULTS as error:
        raise archive.refuse(f"its pickle cannot be run: {type(error).__name__}: {error}") from error


def load_bare(path: Path, *, files: Files, limits: PickleLimits | None = None) -> Any:
    """Loads the object of a file that is only a pickle and refers to no tensor. The pickle is never run."""
    origin = Origin(path, limits or PickleLimits(), files=files)
    size = files.size(path)
    if size > origin.limits.pickle_bytes:
        raise origin.refuse(f"it has {size} bytes, more than the limit of {origin.limits.pickle_bytes}")
    return run(origin, files.read(path, 0, size))


def load(path: str | os.PathLike[str], *, trusted: bool = False, limits: PickleLimits | None = None, files: Files | None = None) -> Any:
    """Loads the object of a file of `torch.save`. Its tensors are `elastic.checkpoint.stored.ReadableTensor` that read through `files`.

    Untrusted (the default): the file cannot choose what is imported or called; unknown classes become `Opaque`. Trusted: the pickle is
    run, whatever it does, and files of torch before 1.6 are read too. Raises CheckpointError with the file and the reason.
    """
    path = Path(path)
    files = Files() if files is None else files
    if trusted and (files.size(path) < 2 or files.read(path, 0, 2) != b"PK"):
        return _references(_torch_load(path), {})
    return load_archive(Archive(path, limits, files=files), trusted=trusted)


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except _FAULTS as error:
        raise CheckpointError(f"{path}: torch cannot load it ({error})") from error


def _references(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return Loaded(tensor=value)
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, dict):
        found = seen[id(value)] = {}
        found.update((key, _references(one, seen)) for key, one in value.items())
        return found
    if type(value) is list:
        made = seen[id(value)] = []
        made.extend(_references(one, seen) for one in value)
        return made
    if type(value) is tuple:
        return tuple(_references(one, seen) for one in value)
    return value
