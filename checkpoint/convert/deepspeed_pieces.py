"""Tensors in pieces over the shards of several ranks, and the source that reads such tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from elastic.checkpoint.dtypes import dtype_of
from elastic.checkpoint.state import Contents, Spec
from elastic.checkpoint.stored import Files, ReadableTensor
from elastic.errors import CheckpointError
from elastic.layout.runs import shared


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPiece:
    """The run `[start, stop)` of a tensor, which is in `held` from its element `at` on."""

    start: int
    stop: int
    held: ReadableTensor
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PiecedTensor:
    """One tensor: its shape, its dtype, and pieces that cover it in ascending order. Raises CheckpointError unless they do."""

    what: str
    spec: Spec
    pieces: tuple[TensorPiece, ...]

    def __post_init__(self) -> None:
        position = 0
        for piece in self.pieces:
            if (
                piece.start != position
                or piece.held.spec.dtype != self.spec.dtype
                or piece.at + piece.stop - piece.start > piece.held.spec.elements
            ):
                raise CheckpointError(f"{self.what}: its shards do not fit together at element {position}")
            position = piece.stop
        if position != self.size:
            raise CheckpointError(f"{self.what}: its shards hold {position} elements, its shape {self.spec.shape} has {self.size}")

    @classmethod
    def whole(cls, what: str, held: ReadableTensor, shape: Sequence[int] | None = None) -> PiecedTensor:
        """Returns a tensor of one piece, by default in its own shape."""
        size = held.spec.elements
        spec = Spec(shape=tuple(held.spec.shape if shape is None else shape), dtype=held.spec.dtype)
        return cls(what=what, spec=spec, pieces=(TensorPiece(start=0, stop=size, held=held, at=0),) if size else ())

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.spec.elements

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Reads a run, flat."""
        if not 0 <= start <= stop <= self.size:
            raise CheckpointError(f"{self.what} has no elements {start} to {stop}")
        parts: list[torch.Tensor] = []
        for piece in self.pieces:
            if both := shared((piece.start, piece.stop), (start, stop)):
                low, high = both
                parts.append(piece.held.run(piece.at + low - piece.start, piece.at + high - piece.start))
        if not parts:
            return torch.empty(0, dtype=dtype_of(self.spec.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


TensorPieces = Mapping[str, Mapping[str, PiecedTensor]]


class PieceSource:
    """A `Source` (see `elastic.checkpoint.state`) over pieces."""

    def __init__(self, kind: str, contents: Contents, found: TensorPieces, files: Files) -> None:
        self.format = kind
        self.contents = contents
        self._found = found
        self._files = files

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """Reads a run of one tensor, flat, in its dtype."""
        if state not in self._found.get(name, {}):
            raise CheckpointError(f"this {self.format} checkpoint has no {state!r} of {name!r}")
        return self._found[name][state].run(start, stop)

    def close(self) -> None:
        """Closes the files."""
        self._files.close()


def specs(found: TensorPieces) -> dict[str, dict[str, Spec]]:
    """Returns the specs of all tensors, for `Contents`."""
    return {name: {state: pieces.spec for state, pieces in states.items()} for name, states in found.items()}


def cut(what: str, shape: Sequence[int], held: Sequence[ReadableTensor]) -> PiecedTensor:
    """Returns a tensor that ZeRO-3 partitioned by itself: rank r of n holds `ceil(size / n)` elements from r times that on, or fewer."""
    size, each = math.prod(shape), -(-math.prod(shape) // len(held))
    bounds = [(min(size, rank * each), min(size, (rank + 1) * each)) for rank in range(len(held))]
    pieces = tuple(TensorPiece(start=low, stop=high, held=one, at=0) for (low, high), one in zip(bounds, held, strict=True) if low < high)
    return PiecedTensor(what=what, spec=Spec(shape=tuple(shape), dtype=held[0].spec.dtype), pieces=pieces)
