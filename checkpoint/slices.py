"""Tensor-parallel slices as runs: a box of a tensor is a list of runs in its row-major order. Widths are always said, never guessed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from checkpoint.state import Source
from elastic.errors import CheckpointError

Cut = tuple[int, int]
"""`[start, stop)` along one dimension."""


def slice_runs(shape: Sequence[int], dim: int, start: int, stop: int) -> Iterator[Cut]:
    """Ascending runs (elements) of the part of a tensor that has indices `[start, stop)` in dimension `dim`; not empty, apart."""
    if not 0 <= dim < len(shape):
        raise CheckpointError(f"dimension {dim} of a tensor of shape {tuple(shape)}")
    if not 0 <= start <= stop <= shape[dim]:
        raise CheckpointError(f"[{start}, {stop}) is not inside of dimension {dim} of shape {tuple(shape)}")
    inner = math.prod(shape[dim + 1 :])
    outer = math.prod(shape[:dim])
    if stop - start == shape[dim]:
        outer, inner, start, stop = 1, outer * inner * shape[dim], 0, 1
    if start < stop and inner:
        stride = inner * (shape[dim] if outer > 1 else 0)
        for row in range(outer):
            yield row * stride + start * inner, row * stride + stop * inner


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """What one tensor-parallel worker has of a tensor: in dimension `dim`, the `cuts` one behind the other, then zeros up to `padded`.

    One cut is the plain case. A fused tensor has one for each of its parts, such as query, key and value, with the widths of that part
    (fewer heads for key and value), or gate and up. `padded` (None: not) is for a vocabulary that is filled up to a round size.
    """

    dim: int
    cuts: tuple[Cut, ...]
    padded: int | None = None

    def __post_init__(self) -> None:
        if self.padded is not None and self.padded < self.width:
            raise CheckpointError(f"cuts of {self.width} in all cannot be padded to {self.padded}")

    @property
    def width(self) -> int:
        """Extent in `dim`, without padding."""
        return sum(stop - start for start, stop in self.cuts)


def fused_slice(dim: int, parts: Sequence[Sequence[int]], rank: int) -> Slice:
    """Of a fused tensor: `parts[i][r]` is the width that worker `r` has of part `i`; parts follow each other, workers inside of parts."""
    cuts: list[Cut] = []
    position = 0
    for widths in parts:
        start = position + sum(widths[:rank])
        cuts.append((start, start + widths[rank]))
        position += sum(widths)
    return Slice(dim=dim, cuts=tuple(cuts))


def read_slice(source: Source, name: str, state: str, wanted: Slice) -> torch.Tensor:
    """That slice, in its own shape. Reads only its runs. Raises CheckpointError if the tensor or the slice of it does not exist."""
    spec = source.contents.tensors.get(source.contents.ties.get(name, name), {}).get(state)
    if spec is None:
        raise CheckpointError(f"there is no {state!r} of {name!r}")
    if not 0 <= wanted.dim < len(spec.shape):
        raise CheckpointError(f"{name!r} of shape {spec.shape} has no dimension {wanted.dim}")
    shape = list(spec.shape)
    shape[wanted.dim] = wanted.width if wanted.padded is None else wanted.padded
    found = torch.zeros(shape, dtype=getattr(torch, spec.dtype))
    position = 0
    for start, stop in wanted.cuts:
        target = found.narrow(wanted.dim, position, stop - start)
        runs = [source.read(name, state, *run) for run in slice_runs(spec.shape, wanted.dim, start, stop)]
        if runs:
            target.copy_(torch.cat(runs).reshape(target.shape))
        position += stop - start
    return found
