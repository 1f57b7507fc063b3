"""From a cost model to tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from elastic.plan.hetero.rules import Floats, Footprint, Rules, spans
from elastic.plan.hetero.shapes import Makeup, Shape, meeting
from elastic.plan.hetero.tables import UNLIMITED, Tables


class Compiler:
    """Remembers what does not depend on the number of replicas, so that the tables of many of them are made quickly."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.seconds = cache(self._seconds)
        self.update_s = cache(rules.update_s)
        self.forward_s = cache(rules.forward_s)
        self.backward_s = cache(rules.backward_s)
        self.footprint = cache(rules.footprint)

    def tables(
        self, size: int, micro_batches: int, makeups: Sequence[Makeup], units: NDArray[np.int64], available: NDArray[np.int64]
    ) -> Tables:
        """The tables of these makeups, all with equally many replicas, for micro-batches of `size` samples."""
        rules, replicas = self._rules, makeups[0].replicas

        def slowest(of: object, makeup: Makeup) -> Floats:
            return np.max([of(shape, size) for shape in makeup.shapes], axis=0)  # type: ignore[operator]

        def between(of: object, one: Makeup, other: Makeup) -> Floats:
            return np.max([of(a, b, size) for a, b in meeting(one, other)], axis=0)  # type: ignore[operator]

        return Tables(
            micro_batches=micro_batches,
            transfers=rules.transfers,
            seconds=np.stack([slowest(self.seconds, makeup) for makeup in makeups]),
            update_s=np.stack([slowest(self.update_s, makeup) for makeup in makeups]),
            sync_s=np.stack([rules.sync_s(makeup) for makeup in makeups]),
            most_in_flight=np.stack([self._most(makeup, size, replicas) for makeup in makeups]),
            forward_s=np.stack([np.stack([between(self.forward_s, a, b) for b in makeups]) for a in makeups]),
            backward_s=np.stack([np.stack([between(self.backward_s, a, b) for b in makeups]) for a in makeups]),
            units=units,
            available=available,
        )

    def _seconds(self, shape: Shape, size: int) -> Floats:
        return spans(self._rules.seconds(shape, size))

    def _most(self, makeup: Makeup, size: int, replicas: int) -> NDArray[np.int64]:
        return np.min([most_in_flight(self.footprint(shape, size, replicas)) for shape in makeup.shapes], axis=0)


def most_in_flight(footprint: Footprint) -> NDArray[np.int64]:
    """How many micro-batches fit beside what is fixed; 0 if not even one."""
    room = footprint.capacity - footprint.fixed
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.floor(room / footprint.in_flight)
    most = np.where(footprint.in_flight > 0, most, np.where(room >= 0, UNLIMITED, 0))
    return np.clip(most, 0, UNLIMITED).astype(np.int64)
