"""Which part of a model some resources can hold when no stage may take longer than a bound: a quick relaxation of the partition.

Transfers are counted as if both neighbours of a stage were the best possible ones, so what does not reach the last layer here does not in
truth. A prefix of the layers is best covered as far as possible, whatever follows: hence one number per (stages behind, resources left)
is enough, and it also tells the exact search which prefixes are hopeless.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from elastic.plan.hetero.rules import Floats
from elastic.plan.hetero.tables import Tables

UNUSED = 1 << 30
TINY = 1e-12

CLOSE = 1.01
"""How near an estimate is to the limit of what can be excluded; it only decides in which order tables are searched."""

Ints = NDArray[np.int64]


class Resources:
    """Amounts of each resource that may be left, numbered; the last number is everything."""

    def __init__(self, units: Ints, available: Ints) -> None:
        dims = available + 1
        self.count = int(np.prod(dims))
        strides = np.concatenate([np.cumprod(dims[::-1])[-2::-1], [1]])
        amounts = np.stack(np.unravel_index(np.arange(self.count), tuple(dims)))
        enough = (amounts[None] >= units[:, :, None]).all(axis=1)
        left = np.arange(self.count)[None] - (units @ strides)[:, None]
        self.after: Ints = np.where(enough, left, -1)
        """(F, count): the number of what is left after one stage of a makeup, or -1."""


class Reach:
    """The relaxation for one table; bounds on stages are given to `furthest`."""

    def __init__(self, tables: Tables, most_stages: int) -> None:
        self.tables = tables
        most = np.minimum(tables.available, tables.layers * tables.units.max(axis=0))
        self.resources = Resources(tables.units, most)
        cheapest = np.where(tables.units > 0, tables.units, UNUSED).min(axis=0)
        self.depth = int(min(most_stages, tables.layers, max(1, (most // cheapest).sum())))
        self.least_s = least_seconds(tables)
        single = np.arange(tables.layers)
        self.layer_s = tables.seconds[:, single, single + 1].min(axis=0)
        self.before_s = np.concatenate([[0.0], np.cumsum(self.layer_s)])
        self._holdable = np.triu(np.ones(self.least_s.shape[1:], dtype=bool), 1)[None] & (tables.most_in_flight > 0)
        self.slowest_s, self.sync_s, self.update_s = (
            _at_least(np.where(self._holdable, of, math.inf)) for of in (self.least_s, tables.sync_s, tables.update_s)
        )

    @property
    def least_step_s(self) -> float:
        """No step takes less; positive; infinite if a layer fits nowhere."""
        if not math.isfinite(self.slowest_s):
            return math.inf
        found = (self.tables.micro_batches - 1) * self.slowest_s + self.before_s[-1] + self.sync_s + self.update_s
        return max(float(found), TINY)

    def caps(self, step_s: float) -> tuple[float, float]:
        """No stage may take longer, and no synchronisation, in any step that takes less than `step_s`."""
        others = self.tables.micro_batches - 1
        rest = self.update_s + self.before_s[-1]
        cap = (step_s - rest - self.sync_s) / others if others else step_s
        return cap, step_s - rest - others * self.slowest_s

    def allowed(self, stage_s: float, sync_s: float) -> NDArray[np.bool_]:
        """(F, n, n): stages that may keep within the bounds."""
        return self._holdable & (self.least_s <= stage_s) & (self.tables.sync_s <= sync_s)

    def furthest(self, allowed: NDArray[np.bool_]) -> Ints:
        """See the function."""
        return furthest(np.where(allowed, self.tables.most_in_flight, 0), self.resources, self.depth)

    def within(self, step_s: float) -> bool:
        """False only if no partition takes less than `step_s`."""
        if not math.isfinite(self.least_step_s):
            return False
        stage_s, sync_s = self.caps(step_s)
        if stage_s < self.slowest_s or sync_s < self.sync_s:
            return False
        return bool(self.furthest(self.allowed(stage_s, sync_s))[0, -1] >= self.tables.layers)


def _at_least(of_stage: Floats) -> float:
    """The least maximum over the stages of any partition: some stage has each layer."""
    least = np.minimum.accumulate(of_stage.min(axis=0), axis=0)
    least = np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1]
    return float(np.diagonal(least, 1).max())


def furthest(most_in_flight: Ints, resources: Resources, depth: int) -> Ints:
    """(depth + 1, resources): where a prefix ends at most, by the number of stages behind it and the resources left for it.

    `most_in_flight` (F, n, n) is how many micro-batches a stage can keep, 0 where it is not allowed.
    """
    extended = _extended(most_in_flight, depth)
    rows = np.arange(len(most_in_flight))[:, None]
    found = np.zeros((depth + 1, resources.count), dtype=np.int64)
    behind = np.empty(resources.count + 1, dtype=np.int64)
    for number in range(depth - 1, -1, -1):
        behind[:-1], behind[-1] = found[number + 1], -1
        found[number] = extended[number][rows, behind[resources.after]].max(axis=0)
    return found


def _extended(most_in_flight: Ints, depth: int) -> Ints:
    """(depth, F, n + 1): where a further stage ends at most when the prefix before it ends at or before a layer; 0 for no prefix."""
    makeups, size, _ = most_in_flight.shape
    deep = most_in_flight[None] > np.arange(depth)[:, None, None, None]
    ends = size - 1 - np.argmax(deep[..., ::-1], axis=-1)
    ends = np.maximum.accumulate(np.where(deep.any(axis=-1), ends, 0), axis=-1)
    return np.concatenate([ends, np.zeros((depth, makeups, 1), dtype=ends.dtype)], axis=-1)


def furthest_in_memory(most_in_flight: Ints, units: Ints, available: Ints) -> int:
    """How many layers fit into memory at most, whatever the time."""
    layers = most_in_flight.shape[1] - 1
    usable = np.triu(most_in_flight, 1)
    resources = Resources(units, np.minimum(available, layers * units.max(axis=0)))
    return int(furthest(usable, resources, layers)[0, -1])


def estimate(reach: Reach, above_s: float) -> float:
    """The least step time that `reach` cannot exclude, or up to 1 % more; `above_s` is one (it may be infinite)."""
    low = reach.least_step_s
    high = above_s if math.isfinite(above_s) else 2 * low
    while not reach.within(high):
        low, high = high, 2 * high
    while high > CLOSE * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reach.within(middle) else (middle, high)
    return high


def least_seconds(tables: Tables) -> Floats:
    """(F, n, n): a stage with the best possible neighbours."""
    charge, n = tables.transfers, tables.layers
    onward, back = tables.forward_s.min(axis=1), tables.backward_s.min(axis=1)
    found = tables.seconds + charge.middle * (onward[:, None, :] + back[:, :, None])
    found[:, 0, :] = tables.seconds[:, 0, :] + min(charge.first) * onward
    found[:, :, n] = tables.seconds[:, :, n] + charge.last * back
    found[:, 0, n] = tables.seconds[:, 0, n]
    found[:, np.tri(n + 1, dtype=bool)] = math.inf
    return found
