"""What any checkpoint holds, whatever its format: the one interface between readers, writers and converters.

Everything is named by the parameter's fully qualified name. A *run* is `[start, stop)` in a tensor's row-major order, in elements: the unit
of reading and writing, so that nothing needs a whole model, or a whole tensor, in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

PARAM = "param"
"""The parameter's own values among the states of its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One tensor: its global shape, and its dtype as torch names it without `torch.`, such as `bfloat16`."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group of an optimizer: its parameters by name, in order, and its hyperparameters (JSON values)."""

    names: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is in a checkpoint, besides the values.

    tensors: of every parameter and buffer, `PARAM` and each optimizer state that is a tensor of its own (`exp_avg`, ...).
    scalars: per parameter, optimizer state that is a number (`step`). groups: empty where there is no optimizer state.
    ties: name -> the name whose tensor it is. frozen, buffers: names that no optimizer updates.
    step: of the training that it was saved at (the number of steps taken), None if it does not say.
    extra: what the format carries besides and can be JSON (scheduler, seed, data cursor, model configuration), by key.
    files: small files that lie beside the weights for the programs that open them (`config.json`, a tokenizer's), by name.
    unread: what is there besides and was not read, in words.
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
        """What is in it."""
        ...

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """The run of one tensor, flat, in its dtype. Raises CheckpointError naming file and reason if it is damaged."""
        ...

    def close(self) -> None:
        """Lets go of files."""
        ...


class DirectSource(Source, Protocol):
    """One that reads to where values are wanted, without a copy in between."""

    def read_into(self, name: str, state: str, start: int, values: torch.Tensor) -> None:
        """Fills flat contiguous host memory of the tensor's dtype with the run from `start` on. Raises CheckpointError as `read`."""
        ...
