"""A tensor that lies in pieces over the shards of several ranks, and the source that reads such tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from checkpoint.pickles import TensorRef
from checkpoint.state import Contents, Spec
from elastic.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The run `[start, stop)` of a tensor: in `held`, from its element `at` on."""

    start: int
    stop: int
    held: TensorRef
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """One tensor: its shape, its dtype, and pieces that cover it in ascending order. Raises CheckpointError unless they do."""

    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        position = 0
        for piece in self.pieces:
            if (
                piece.start != position
                or piece.held.dtype != self.dtype
                or piece.at + piece.stop - piece.start > math.prod(piece.held.shape)
            ):
                raise CheckpointError(f"{self.what}: its shards do not fit together at element {position}")
            position = piece.stop
        if position != math.prod(self.shape):
            raise CheckpointError(f"{self.what}: its shards hold {position} elements, its shape {self.shape} has {math.prod(self.shape)}")

    @classmethod
    def whole(cls, what: str, held: TensorRef) -> Pieces:
        """A tensor that lies in one place."""
        piece = Piece(start=0, stop=math.prod(held.shape), held=held, at=0)
        return cls(what=what, shape=tuple(held.shape), dtype=held.dtype, pieces=(piece,))

    @property
    def spec(self) -> Spec:
        """Shape and dtype as `Contents` has them."""
        return Spec(shape=self.shape, dtype=str(self.dtype).removeprefix("torch."))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The run, flat."""
        if not 0 <= start <= stop <= math.prod(self.shape):
            raise CheckpointError(f"{self.what} has no elements {start} to {stop}")
        parts: list[torch.Tensor] = []
        for piece in self.pieces:
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                parts.append(piece.held.read(piece.at + low - piece.start, piece.at + high - piece.start))
        if not parts:
            return torch.empty(0, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


Found = Mapping[str, Mapping[str, Pieces]]


class PieceSource:
    """A `Source` (see `checkpoint.state`) over pieces; it keeps no file open."""

    def __init__(self, kind: str, contents: Contents, found: Found) -> None:
        self.format = kind
        self.contents = contents
        self._found = found

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        """The run of one tensor, flat, in its dtype."""
        if state not in self._found.get(name, {}):
            raise CheckpointError(f"this {self.format} checkpoint has no {state!r} of {name!r}")
        return self._found[name][state].read(start, stop)

    def close(self) -> None:
        """Nothing is open."""


def specs(found: Found) -> dict[str, dict[str, Spec]]:
    """The specs of all, for `Contents`."""
    return {name: {state: pieces.spec for state, pieces in states.items()} for name, states in found.items()}


def cut(what: str, shape: Sequence[int], held: Sequence[TensorRef]) -> Pieces:
    """A tensor that ZeRO-3 has cut by itself: rank r of n holds `ceil(size / n)` elements from r times that on, the last ones padded."""
    size, each = math.prod(shape), -(-math.prod(shape) // len(held))
    bounds = [(min(size, rank * each), min(size, (rank + 1) * each)) for rank in range(len(held))]
    pieces = tuple(Piece(start=low, stop=high, held=one, at=0) for (low, high), one in zip(bounds, held, strict=True) if low < high)
    return Pieces(what=what, shape=tuple(shape), dtype=held[0].dtype, pieces=pieces)
