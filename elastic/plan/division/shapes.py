"""The replicas of one stage, each of one device kind and tensor-parallel degree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from elastic.errors import PlanError


class Pool(NamedTuple):
    """Interchangeable devices: those of one kind in one zone."""

    kind: str
    zone: str
    count: int


class Shape(NamedTuple):
    """One replica: `tp` devices of the pool with index `pool`."""

    pool: int
    tp: int


class ReplicaCount(NamedTuple):
    """`count` replicas of one shape."""

    shape: Shape
    count: int


@dataclass(frozen=True, slots=True)
class Makeup:
    """The replicas of one stage, in a fixed order: replica j of a stage exchanges messages with replica j of the next.

    Raises PlanError if there is no replica, or if a part has none.
    """

    parts: tuple[ReplicaCount, ...]

    def __post_init__(self) -> None:
        if not self.parts or any(count < 1 or shape.tp < 1 for shape, count in self.parts):
            raise PlanError(f"a stage needs replicas, at least one in each part: {self.parts}")

    @property
    def replicas(self) -> int:
        """How many replicas the stage has."""
        return sum(count for _, count in self.parts)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the parts, in order."""
        return tuple(shape for shape, _ in self.parts)

    def devices(self, pool: int) -> int:
        """Returns how many devices of a pool the stage takes."""
        return sum(shape.tp * count for shape, count in self.parts if shape.pool == pool)

    def each(self) -> tuple[Shape, ...]:
        """Returns the shape of every replica, in order."""
        return tuple(shape for shape, count in self.parts for _ in range(count))


def alike(shape: Shape, replicas: int) -> Makeup:
    """Makes a stage whose replicas are all of one shape."""
    return Makeup((ReplicaCount(shape, replicas),))


def together(shapes: Iterable[Shape]) -> Makeup:
    """Makes a stage with these replicas, in this order."""
    return Makeup(tuple(ReplicaCount(shape, len(list(same))) for shape, same in groupby(shapes)))


def meeting(one: Makeup, other: Makeup) -> set[tuple[Shape, Shape]]:
    """Returns the pairs of shapes that exchange messages, where replica j of one stage does so with replica j of the other."""
    ends: list[dict[int, Shape]] = []
    for makeup in (one, other):
        place, found = 0, {}
        for shape, count in makeup.parts:
            place += count
            found[place] = shape
        ends.append(found)
    first, second = ends
    return {(_at(first, end), _at(second, end)) for end in first.keys() | second.keys()}


def _at(ends: dict[int, Shape], place: int) -> Shape:
    """Returns the shape of the replica before `place`; a stage with fewer replicas starts over."""
    last = max(ends)
    wanted = (place - 1) % last + 1
    return next(shape for end, shape in ends.items() if end >= wanted)
