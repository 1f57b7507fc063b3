"""Compiles a cost model into tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from elastic.plan.division.rules import Floats, Footprint, PoolCosts, spans
from elastic.plan.division.shapes import Makeup, Shape, meeting
from elastic.plan.division.tables import UNLIMITED, Tables

Between = Callable[[Shape, Shape, int], Floats]


class Compiler:
    """Makes tables, and caches values that do not depend on the number of replicas, so that further tables are made quickly."""

    def __init__(self, rules: PoolCosts) -> None:
        self._rules = rules
        self._pairs = cache(self._all_pairs)
        self._ones = cache(self._all_ones)
        self._most = cache(lambda shape, size, shared: most_in_flight(rules.footprint(shape, size, shared)))

    def tables(
        self, size: int, micro_batches: int, makeups: Sequence[Makeup], units: NDArray[np.int64], available: NDArray[np.int64]
    ) -> Tables:
        """Returns the tables of these makeups, all with equally many replicas, for micro-batches of `size` samples.

        Between two mixed makeups it assumes that every shape sends to every other.
        """
        shapes = tuple(sorted({shape for makeup in makeups for shape in makeup.shapes}))
        members = [[shapes.index(shape) for shape in makeup.shapes] for makeup in makeups]
        seconds, update_s = self._ones(shapes, size)
        forward_s, backward_s = self._pairs(shapes, size)
        shared = makeups[0].replicas > 1
        most = np.stack([self._most(shape, size, shared) for shape in shapes])
        return Tables(
            micro_batches=micro_batches,
            transfers=self._rules.transfers,
            seconds=_slowest(seconds, members),
            update_s=_slowest(update_s, members),
            sync_s=np.stack([self._rules.sync_s(makeup) for makeup in makeups]),
            most_in_flight=-_slowest(-most, members),
            forward_s=_slowest(_slowest(forward_s, members).swapaxes(0, 1), members).swapaxes(0, 1),
            backward_s=_slowest(_slowest(backward_s, members).swapaxes(0, 1), members).swapaxes(0, 1),
            units=units,
            available=available,
        )

    def _all_ones(self, shapes: tuple[Shape, ...], size: int) -> tuple[Floats, Floats]:
        rules = self._rules
        return (
            np.stack([spans(rules.seconds(shape, size)) for shape in shapes]),
            np.stack([rules.update_s(shape, size) for shape in shapes]),
        )

    def _all_pairs(self, shapes: tuple[Shape, ...], size: int) -> tuple[Floats, Floats]:
        def all_of(between: Between) -> Floats:
            return np.stack([np.stack([between(one, other, size) for other in shapes]) for one in shapes])

        return all_of(self._rules.forward_s), all_of(self._rules.backward_s)


def _slowest(of_shapes: NDArray, members: Sequence[Sequence[int]]) -> NDArray:
    """Returns the maximum over the members of each makeup, along the first axis."""
    first, last = [group[0] for group in members], [group[-1] for group in members]
    if all(len(group) == 1 for group in members):
        return of_shapes[first]
    return np.maximum(of_shapes[first], of_shapes[last]) if all(len(group) < 3 for group in members) else _many(of_shapes, members)


def _many(of_shapes: NDArray, members: Sequence[Sequence[int]]) -> NDArray:
    return np.stack([of_shapes[list(group)].max(axis=0) for group in members])


def most_in_flight(footprint: Footprint) -> NDArray[np.int64]:
    """Returns how many micro-batches fit next to the fixed bytes; 0 if not even one."""
    room = footprint.capacity - footprint.fixed
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.floor(room / footprint.in_flight)
    most = np.where(footprint.in_flight > 0, most, np.where(room >= 0, UNLIMITED, 0))
    return np.clip(most, 0, UNLIMITED).astype(np.int64)


def crossing(between: Between, one: Makeup, other: Makeup, size: int) -> Floats:
    """Returns the slowest transfer between the replicas of two stages that send to each other."""
    return np.max([between(a, b, size) for a, b in meeting(one, other)], axis=0)
