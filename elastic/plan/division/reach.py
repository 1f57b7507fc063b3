"""Finds which part of a model some resources can hold within a bound on each stage's time: a quick relaxation of the partition.

Transfers are counted as if both neighbours of a stage were the best possible ones, so a partition that does not reach the last layer here
does not exist. A prefix of the layers should always reach as far as possible, whatever follows. So one number per (later stages, resources
left) is enough, and it also excludes hopeless prefixes in the exact search.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from elastic.plan.division.coverage import Ints, Resources, furthest, last_in_memory, last_index
from elastic.plan.division.prices import TINY, Prices
from elastic.plan.division.rules import Floats
from elastic.plan.division.tables import Tables

UNUSED = 1 << 30
SLACK = 1e-9
BANDS, GRID = 3, 6
MANY, TOO_MANY = 100, 5000
"""Numbers of amounts of resources: from the first on, try a relaxation first; from the second on, try one step time at a time."""


class Reach:
    """The relaxation for one table. `furthest` takes the bounds on stages."""

    def __init__(self, tables: Tables, most_stages: int) -> None:
        self.tables = tables
        most = np.minimum(tables.available, tables.layers * tables.units.max(axis=0))
        self.resources = Resources(tables.units, most)
        cheapest = np.where(tables.units > 0, tables.units, UNUSED).min(axis=0)
        self.depth = int(min(most_stages, tables.layers, max(1, (most // cheapest).sum())))
        self.least_s = least_seconds(tables)
        self.prices = Prices(tables, most)
        self._holdable = np.triu(np.ones(self.least_s.shape[1:], dtype=bool), 1)[None] & (tables.most_in_flight > 0)
        weights = self.prices.weights()
        self._one_resource = Resources((tables.units @ weights)[:, None], np.array([most @ weights]))
        """All resources added up, weighted by their prices: a relaxation with far fewer amounts."""
        self._in_memory = last_in_memory(tables.most_in_flight, self.depth)
        self.slowest_s, self.sync_s, self.update_s = (
            _at_least(np.where(self._holdable, of, math.inf)) for of in (self.least_s, tables.sync_s, tables.update_s)
        )
        self.slowest_s = max(self.slowest_s, self.prices.slowest_s)

    @property
    def least_step_s(self) -> float:
        """A lower bound on the step time; positive, and infinite if a layer fits nowhere."""
        if not math.isfinite(self.slowest_s):
            return math.inf
        return max(self.prices.step_s(self.slowest_s) + self.sync_s + self.update_s, TINY)

    def caps(self, step_s: float) -> tuple[float, float]:
        """Returns the longest stage and the longest synchronisation possible in a step that takes less than `step_s`."""
        rest_s = step_s - self.update_s
        return self.prices.stage_s(rest_s - self.sync_s), rest_s - self.prices.step_s(self.slowest_s)

    def allowed(self, stage_s: float, sync_s: float) -> NDArray[np.bool_]:
        """Returns (F, n, n): the stages that may keep within the bounds."""
        return self._holdable & (self.least_s <= stage_s) & (self.tables.sync_s <= sync_s)

    def furthest(self, stage_s: ArrayLike, sync_s: ArrayLike, resources: Resources | None = None) -> Ints:
        """Returns (depth + 1, ..., resources): how far a prefix reaches at most, under bounds of any shape.

        It is indexed by the number of later stages and the resources left for the prefix.
        """
        stage_s, sync_s = (np.asarray(bound)[..., None, None, None] for bound in (stage_s, sync_s))
        ends = np.minimum(last_index(self.least_s <= stage_s), last_index(self.tables.sync_s <= sync_s))
        ends = np.minimum(ends, self._in_memory.reshape(self.depth, *[1] * (ends.ndim - 2), *ends.shape[-2:]))
        return furthest(ends, self.resources if resources is None else resources)

    def within(self, step_s: float) -> bool:
        """Returns False only if no partition takes less than `step_s`."""
        return self.first_within([step_s]) == 0

    def first_within(self, steps_s: Sequence[float]) -> int:
        """Returns the index of the first of these ascending step times that is not excluded, or their number."""
        if math.isinf(self.least_step_s):
            return len(steps_s)
        excluded = bisect_left(steps_s, self.least_step_s)
        if self.resources.count > MANY:
            excluded += self._first_within(steps_s[excluded:], self._one_resource)
        if self.resources.count <= TOO_MANY:
            return excluded + self._first_within(steps_s[excluded:], self.resources)
        while excluded < len(steps_s) and self._first_within(steps_s[excluded : excluded + 1], self.resources):
            excluded += 1
        return excluded

    def _first_within(self, steps_s: Sequence[float], resources: Resources) -> int:
        """Tries ranges of synchronisation one by one: the shorter it is, the longer stages may be."""
        if not steps_s:
            return 0
        stage_s, sync_s = np.moveaxis(np.array([self._bounds(step_s) for step_s in steps_s]), -1, 0)
        covered = self.furthest(stage_s, sync_s, resources)[0, ..., -1] >= self.tables.layers
        return int(np.argmax(np.append(covered.any(axis=1), True)))

    def _bounds(self, step_s: float) -> list[tuple[float, float]]:
        """Returns pairs of bounds, on stages and on synchronisation; every partition shorter than `step_s` keeps at least one pair."""
        low, high, rest_s = self.sync_s, self.caps(step_s)[1], step_s - self.update_s
        if not 0 < low < high < math.inf:
            return [(self.prices.stage_s(rest_s - low), high)] * BANDS
        edges = [low * (high / low) ** (band / BANDS) for band in range(BANDS + 1)]
        return [(self.prices.stage_s(rest_s - floor), top * (1 + SLACK)) for floor, top in pairwise(edges)]


def _at_least(of_stage: Floats) -> float:
    """Returns the least possible maximum over the stages of any partition: some stage has each layer."""
    least = np.minimum.accumulate(of_stage.min(axis=0), axis=0)
    least = np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1]
    return float(np.diagonal(least, 1).max())


def estimate(reach: Reach, above_s: float) -> float:
    """Returns about the least step time that `reach` cannot exclude; `above_s` is one such time (it may be infinite)."""
    low = reach.least_step_s
    high = above_s if math.isfinite(above_s) else 2 * low
    while not reach.within(high):
        low, high = high, 2 * high
    for _ in range(2):
        grid = [low * (high / low) ** (part / GRID) for part in range(1, GRID)]
        place = reach.first_within(grid)
        low, high = [low, *grid][place], [*grid, high][place]
    return high


def least_seconds(tables: Tables) -> Floats:
    """Returns (F, n, n): the seconds of each stage with the best possible neighbours."""
    charge, n = tables.transfers, tables.layers
    onward, back = tables.forward_s.min(axis=1), tables.backward_s.min(axis=1)
    found = tables.seconds + charge.middle * (onward[:, None, :] + back[:, :, None])
    found[:, 0, :] = tables.seconds[:, 0, :] + min(charge.first) * onward
    found[:, :, n] = tables.seconds[:, :, n] + charge.last * back
    found[:, 0, n] = tables.seconds[:, 0, n]
    found[:, np.tri(n + 1, dtype=bool)] = math.inf
    return found
