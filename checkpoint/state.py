"""The contents of a checkpoint of any format: the one interface between readers, writers and converters.

State is keyed by the parameter's fully qualified name. A *run* is `[start, stop)` in a tensor's row-major order, in elements. Runs are the
unit of reading and writing, so that no program needs a whole model, or a whole tensor, in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from elastic.checkpoint.dtypes import itemsize

PARAM = "param"
"""The state name of the parameter's own values."""

MASTER = "fp32_master"
"""The state name of a parameter's float32 master, of which its own values are the rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One tensor: its global shape, and its dtype as torch names it without `torch.`, such as `bfloat16`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return itemsize(self.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return self.elements * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group of an optimizer: its parameters by name, in order, and its hyperparameters (JSON values)."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The contents of a checkpoint, without the values.

    tensors: of every parameter and buffer, `PARAM` and each optimizer state that is a tensor of its own (`exp_avg`, ...).
    scalars: per parameter, optimizer state that is a number (`step`). groups: empty if there is no optimizer state.
    ties: a tied name -> the name under which the tensor is stored. frozen, buffers: names that no optimizer updates.
    step: the number of training steps taken at the save, None if the checkpoint does not hold it.
    extra: other data of the format that can be JSON (scheduler, seed, data cursor, model configuration), by key.
    files: small files that accompany the weights for other programs (`config.json`, a tokenizer's), by name.
    unread: descriptions of data that the checkpoint holds and that was not read.
    """

    tensors: Mapping[str, Mapping[str, Spec]]
    scalars: Mapping[str, Mapping[str, float | int | bool]] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    ties: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    step: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


class Source(Protocol):
    """A checkpoint that can be read, tensor by tensor, run by run."""

    format: str

    @property
    def contents(self) -> Contents:
        """The contents of the checkpoint."""
        ...

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """Reads a run of one tensor, flat, in its dtype. Raises CheckpointError with file and reason if it is damaged."""
        ...

    def close(self) -> None:
        """Closes the files."""
        ...


class DirectSource(Source, Protocol):
    """A source that reads into given memory, without a copy in between."""

    def read_into(self, name: str, state: str, start: int, values: torch.Tensor) -> None:
        """Fills flat contiguous host memory of the tensor's dtype with the run from `start` on. Raises CheckpointError as `read`."""
        ...
