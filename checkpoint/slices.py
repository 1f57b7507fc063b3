"""Tensor-parallel slices as runs: a box of a tensor is a list of runs in its row-major order. Widths are always given, never guessed.

`Slice` describes one rank's share of a tensor, `Slicing` the shares of all ranks, `Patch` the place of a run of the whole in a slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from elastic.checkpoint.state import Source
from elastic.errors import CheckpointError
from elastic.layout.boxes import runs_of_box
from elastic.layout.runs import Run
from elastic.memory.tensors import zeros


def slice_runs(shape: Sequence[int], dim: int, start: int, stop: int) -> list[Run]:
    """Returns the runs (elements) of a tensor's part with indices `[start, stop)` in dimension `dim`: ascending, not empty, disjoint.

    Raises CheckpointError if the tensor has no such part.
    """
    if not 0 <= dim < len(shape):
        raise CheckpointError(f"a tensor of shape {tuple(shape)} has no dimension {dim}")
    if not 0 <= start <= stop <= shape[dim]:
        raise CheckpointError(f"[{start}, {stop}) is not inside dimension {dim} of shape {tuple(shape)}")
    box = tuple(start if i == dim else 0 for i in range(len(shape))), tuple(stop - start if i == dim else n for i, n in enumerate(shape))
    return [run for run in runs_of_box(shape, box) if run[0] < run[1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One tensor-parallel rank's share of a tensor: in dimension `dim`, the `cuts` one after another, then zeros up to `padded`.

    A plain tensor has one cut. A fused tensor has one for each of its parts, such as query, key and value, with the widths of that part
    (fewer heads for key and value), or gate and up. `padded` (None: no padding) is for a vocabulary that is padded to a round size.
    """

    dim: int
    cuts: tuple[Run, ...]
    padded: int | None = None

    def __post_init__(self) -> None:
        if self.padded is not None and self.padded < self.width:
            raise CheckpointError(f"cuts of {self.width} in all cannot be padded to {self.padded}")

    @property
    def width(self) -> int:
        """Extent in `dim`, without padding."""
        return sum(stop - start for start, stop in self.cuts)


def fused_slice(dim: int, parts: Sequence[Sequence[int]], rank: int, padded: int | None = None) -> Slice:
    """Returns a rank's slice of a fused tensor: `parts[i][r]` is rank `r`'s width of part `i`; parts follow each other, ranks within."""
    cuts: list[Run] = []
    position = 0
    for widths in parts:
        start = position + sum(widths[:rank])
        cuts.append((start, start + widths[rank]))
        position += sum(widths)
    return Slice(dim=dim, cuts=tuple(cuts), padded=padded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """The elements that a run of a whole tensor shares with the slice of `rank`, as `rows` equal rows. All numbers are elements.

    In the slice, row `i` is the run of `width` from `at + i * stride` on. It consists of `pieces`, each `(start, count)`, one after
    another; piece `(start, count)` of row `i` lies in the whole tensor from `start + i * pitch` on.
    """

    rank: int
    rows: int
    at: int
    stride: int
    pieces: tuple[Run, ...]
    pitch: int

    @property
    def width(self) -> int:
        """Elements of one row."""
        return sum(count for _, count in self.pieces)

    def divided(self, most: int) -> Iterator[Patch]:
        """Splits this into patches of whole rows, each of a single row or spanning at most `most` elements of the slice."""
        count = max(1, most // max(self.stride, 1))
        for row in range(0, self.rows, count):
            yield Patch(
                rank=self.rank,
                rows=min(count, self.rows - row),
                at=self.at + row * self.stride,
                stride=self.stride,
                pieces=tuple((start + row * self.pitch, length) for start, length in self.pieces),
                pitch=self.pitch,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slicing:
    """The division of a tensor among ranks: rank `r` has `widths[i][r]` of part `i` of dimension `dim`; parts follow each other.

    A plain tensor is one part. `padded` (None: no padding): the extent of each rank's slice with zeros at its end.
    """

    dim: int
    widths: tuple[tuple[int, ...], ...]
    padded: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        ranks = {len(part) for part in self.widths}
        if self.dim < 0 or len(ranks) != 1 or 0 in ranks or any(width < 0 for part in self.widths for width in part):
            raise CheckpointError(
                f"slices of dimension {self.dim} by widths {self.widths}: dimension and widths must not be negative, "
                "and each part must have one width for each rank"
            )
        if self.padded is not None and (len(self.padded) != self.ranks or any(map(int.__lt__, self.padded, self._own))):
            raise CheckpointError(f"slices of {list(self._own)} cannot be padded to {list(self.padded)}")

    def __str__(self) -> str:
        widths = " | ".join("+".join(map(str, part)) for part in self.widths)
        padded = "" if self.padded is None else f", padded to {'+'.join(map(str, self.padded))}"
        return f"dimension {self.dim} by {self.ranks}: {widths}{padded}"

    @property
    def ranks(self) -> int:
        """Number of ranks that share the tensor."""
        return len(self.widths[0])

    @property
    def _own(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(*self.widths, strict=True)))

    @property
    def extents(self) -> tuple[int, ...]:
        """Extent of each rank's slice in `dim`, with padding."""
        return self._own if self.padded is None else self.padded

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Each rank's slice."""
        return _slices(self)

    def check(self, shape: Sequence[int]) -> None:
        """Raises CheckpointError unless this slicing fits tensors of this shape."""
        if self.dim >= len(shape) or sum(self._own) != shape[self.dim]:
            raise CheckpointError(f"{self} is not a slicing of a tensor of shape {list(shape)}")

    def shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Returns the shape of that rank's slice of a tensor of `shape`."""
        return (*shape[: self.dim], self.extents[rank], *shape[self.dim + 1 :])

    def patches(self, shape: Sequence[int], start: int, stop: int) -> Iterator[Patch]:
        """Yields the patches of the run `[start, stop)` (elements) of the whole tensor; each element is in one patch.

        A row is all of dimension `dim` and of the later ones. A run is a part of a first row, whole rows, and a part of a last row.
        """
        row = math.prod(shape[self.dim :])
        if start >= stop:
            return
        (first, low), (last, high) = divmod(start, row), divmod(stop, row)
        if first == last:
            yield from self._rows(shape, first, 1, low, high)
            return
        if low:
            yield from self._rows(shape, first, 1, low, row)
            first += 1
        if first < last:
            yield from self._rows(shape, first, last - first, 0, row)
        if high:
            yield from self._rows(shape, last, 1, 0, high)

    def _rows(self, shape: Sequence[int], first: int, rows: int, low: int, high: int) -> Iterator[Patch]:
        """Yields the patches of elements `[low, high)` of `rows` rows. A rank's share of an interval is an interval of its slice."""
        inner = math.prod(shape[self.dim + 1 :])
        row = shape[self.dim] * inner
        for rank, own in enumerate(self.slices):
            stride = self.extents[rank] * inner
            at, position, pieces = 0, first * stride, []
            for cut in own.cuts:
                start, stop = max(low, cut[0] * inner), min(high, cut[1] * inner)
                if start < stop:
                    at = at if pieces else position + start - cut[0] * inner
                    pieces.append((first * row + start, stop - start))
                position += (cut[1] - cut[0]) * inner
            if pieces:
                yield Patch(rank=rank, rows=rows, at=at, stride=stride, pieces=tuple(pieces), pitch=row)

    def padding(self, shape: Sequence[int], rank: int) -> Iterator[Run]:
        """Yields the runs (elements) of padding in that rank's slice."""
        inner = math.prod(shape[self.dim + 1 :])
        extent, own = self.extents[rank] * inner, self._own[rank] * inner
        if own < extent:
            for row in range(math.prod(shape[: self.dim])):
                yield row * extent + own, (row + 1) * extent


@lru_cache(maxsize=4096)
def _slices(slicing: Slicing) -> tuple[Slice, ...]:
    padded = slicing.padded or (None,) * slicing.ranks
    return tuple(fused_slice(slicing.dim, slicing.widths, rank, extent) for rank, extent in enumerate(padded))


def read_slice(source: Source, name: str, state: str, wanted: Slice) -> torch.Tensor:
    """Reads a slice, in its own shape, and nothing else. Raises CheckpointError if the tensor or the slice of it does not exist."""
    spec = source.contents.tensors.get(source.contents.ties.get(name, name), {}).get(state)
    if spec is None:
        raise CheckpointError(f"there is no {state!r} of {name!r}")
    if not 0 <= wanted.dim < len(spec.shape):
        raise CheckpointError(f"{name!r} of shape {spec.shape} has no dimension {wanted.dim}")
    shape = list(spec.shape)
    shape[wanted.dim] = wanted.width if wanted.padded is None else wanted.padded
    found = zeros(shape, getattr(torch, spec.dtype))
    position = 0
    for start, stop in wanted.cuts:
        target = found.narrow(wanted.dim, position, stop - start)
        runs = [source.read(name, state, *run) for run in slice_runs(spec.shape, wanted.dim, start, stop)]
        if runs:
            target.copy_(torch.cat(runs).reshape(target.shape))
        position += stop - start
    return found
