"""One file of `torch.save`: read by the restricted interpreter, or, where the user trusts it, by torch."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoint.pickles.archive import Archive, Limits
from checkpoint.pickles.machine import run
from elastic.errors import CheckpointError


class TensorRef(Protocol):
    """A tensor that is read by runs of its elements in row-major order."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A tensor that torch has loaded (mapped, where the file is a zip file)."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As torch has it."""
        return self.tensor.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The run, flat, as a copy."""
        return self.tensor.detach().reshape(-1)[start:stop].clone()


def load(path: str | os.PathLike[str], *, trusted: bool = False, limits: Limits | None = None) -> Any:
    """The object in a file of `torch.save`, its tensors as `TensorRef`.

    Untrusted (the default): nothing of the file's choice is imported or called; unknown classes become `Opaque`. Trusted: `torch.load` runs
    the pickle, whatever it does. Raises CheckpointError naming the file and the reason.
    """
    path = Path(path)
    if trusted:
        return _references(_torch_load(path), {})
    archive = Archive(path, limits or Limits())
    return run(archive, archive.whole("data.pkl", archive.limits.pickle_bytes))


def _torch_load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=False)
    except (OSError, RuntimeError, ValueError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
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
