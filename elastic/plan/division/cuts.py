"""The exact search among the partitions of one table: a dynamic programme from the last stage to the first.

A label is a suffix of the layers, cut into stages. Labels of equally many stages are extended together, by every makeup and every first
layer. A label is dropped if it cannot lead to a better partition than the best known one (`reach` bounds the rest), or if another label
with the same first layer, makeup and resources left is at least as good in all of: largest stage, sum of stages, synchronisation, update.
The time that a stage needs to send gradients back depends on the stage before it; until that is known, the stage's time is `open_s`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from elastic.plan.division.coverage import Ints
from elastic.plan.division.reach import Reach
from elastic.plan.division.rules import Floats
from elastic.plan.division.tables import StageCut, Tables


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Suffixes of equally many stages; `parent` is the index of the suffix without its first stage."""

    start: Ints
    stop: Ints
    makeup: Ints
    left: Ints
    parent: Ints
    open_s: Floats
    worst_s: Floats
    sum_s: Floats
    sync_s: Floats
    update_s: Floats

    def __len__(self) -> int:
        return len(self.start)

    def take(self, which: NDArray[np.bool_] | Ints) -> Labels:
        """Selects some of the labels."""
        return Labels(*(getattr(self, field.name)[which] for field in fields(self)))


class Search:
    """Finds the best partition of a table below `bound_s`. `exact` turns false if it had to drop labels beyond `most_labels`."""

    def __init__(self, reach: Reach, bound_s: float, most_labels: int = 200_000) -> None:
        self.tables, self.reach, self.bound_s = reach.tables, reach, bound_s
        self.most_labels, self.exact = most_labels, True
        caps = reach.caps(bound_s)
        self.allowed, self.furthest = reach.allowed(*caps), reach.furthest(*caps)
        self.prices = reach.prices.telling(reach.slowest_s)
        self.value = {int(price): reach.prices.price[price] @ reach.resources.amounts for price in self.prices}
        self.levels: list[Labels] = []
        self.best: tuple[int, int] | None = None

    def run(self) -> tuple[StageCut, ...] | None:
        """Returns the best stages, or None if there are none below the bound."""
        labels = self._last_stages()
        while len(labels):
            self.levels.append(labels)
            self._complete(labels)
            if len(self.levels) == self.reach.depth:
                break
            labels = self._trim(self._extend(labels))
        return None if self.best is None else self._trace(*self.best)

    def _last_stages(self) -> Labels:
        tables, end = self.tables, self.tables.layers
        makeup, start = np.nonzero(self.allowed[:, :, end])
        left = self.reach.resources.after[makeup, -1]
        keep = (left >= 0) & (start <= self.furthest[1][left])
        makeup, start, left = makeup[keep], start[keep], left[keep]
        zero = np.zeros(len(start))
        return self._trim(
            Labels(
                start,
                np.full_like(start, end),
                makeup,
                left,
                np.full_like(start, -1),
                tables.seconds[makeup, start, end],
                zero,
                zero,
                tables.sync_s[makeup, start, end],
                tables.update_s[makeup, start, end],
            )
        )

    def _extend(self, labels: Labels) -> Labels:
        """Adds one stage in front of every label, in each way that may lead to a partition below the bound."""
        tables, number = self.tables, len(self.levels)
        old, makeup, start = self._places(labels, number)
        base, stop = labels.take(old), labels.start[old]
        charge = tables.transfers.last if number == 1 else tables.transfers.middle
        closed_s = base.open_s + charge * tables.backward_s[base.makeup, makeup, stop]
        sends = np.where(start > 0, tables.transfers.middle, tables.transfers.of_first(number + 1))
        return Labels(
            start,
            stop,
            makeup,
            self.reach.resources.after[makeup, base.left],
            old,
            tables.seconds[makeup, start, stop] + sends * tables.forward_s[makeup, base.makeup, stop],
            np.maximum(base.worst_s, closed_s),
            base.sum_s + closed_s,
            np.maximum(base.sync_s, tables.sync_s[makeup, start, stop]),
            np.maximum(base.update_s, tables.update_s[makeup, start, stop]),
        )

    def _places(self, labels: Labels, number: int) -> tuple[Ints, Ints, Ints]:
        """Returns the label, makeup and first layer of each possible further stage."""
        open_ends = np.nonzero(labels.start > 0)[0]
        left = self.reach.resources.after[:, labels.left[open_ends]]
        later = np.append(self.furthest[number + 1], -1) if number < self.reach.depth else np.full(self.reach.resources.count + 1, -1)
        ends = labels.start[open_ends]
        first = np.argmax(self.allowed, axis=1)[:, ends]
        widths = np.where(left >= 0, np.minimum(later[left], ends - 1) - first + 1, 0).clip(0)
        makeup, which = np.nonzero(widths)
        counts = widths[makeup, which]
        offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.repeat(first[makeup, which], counts) + offset
        makeup, old = np.repeat(makeup, counts), np.repeat(open_ends[which], counts)
        stop = labels.start[old]
        keep = self.allowed[makeup, start, stop] & (self.tables.most_in_flight[makeup, start, stop] > number)
        return old[keep], makeup[keep], start[keep]

    def _step_s(self, labels: Labels) -> Floats:
        """Returns the seconds of a step whose stages are all in the label."""
        worst = np.maximum(labels.worst_s, labels.open_s)
        return (self.tables.micro_batches - 1) * worst + labels.sum_s + labels.open_s + labels.sync_s + labels.update_s

    def _lower_s(self, labels: Labels) -> Floats:
        """Returns a lower bound on the seconds of a step with this suffix."""
        reach, prices = self.reach, self.reach.prices
        worst = np.maximum(np.maximum(labels.worst_s, labels.open_s), reach.slowest_s)
        step_s = np.full(len(labels), -math.inf)
        for price in self.prices:
            left = self.value[price][labels.left]
            step_s = np.maximum(step_s, (prices.others - left) * worst + prices.before_s[price][labels.start])
        once_s = np.maximum(labels.sync_s, reach.sync_s) + np.maximum(labels.update_s, reach.update_s)
        return step_s + labels.sum_s + labels.open_s + once_s

    def _complete(self, labels: Labels) -> None:
        ends = np.nonzero(labels.start == 0)[0]
        if not len(ends):
            return
        step_s = self._step_s(labels.take(ends))
        best = int(np.argmin(step_s))
        if step_s[best] < self.bound_s:
            self.bound_s, self.best = float(step_s[best]), (len(self.levels) - 1, int(ends[best]))

    def _trim(self, labels: Labels) -> Labels:
        lower = self._lower_s(labels)
        keep = np.nonzero(lower < self.bound_s)[0]
        labels, lower = labels.take(keep), lower[keep]
        labels, lower = _undominated(labels, lower, self.reach.resources.count, self.tables)
        if len(labels) > self.most_labels:
            self.exact = False
            labels = labels.take(np.argpartition(lower, self.most_labels)[: self.most_labels])
        return labels

    def _trace(self, level: int, which: int) -> tuple[StageCut, ...]:
        found: list[StageCut] = []
        while level >= 0:
            labels = self.levels[level]
            found.append(StageCut(int(labels.start[which]), int(labels.stop[which]), int(labels.makeup[which])))
            level, which = level - 1, int(labels.parent[which])
        return tuple(found)


def _undominated(labels: Labels, lower: Floats, resources: int, tables: Tables) -> tuple[Labels, Floats]:
    """Drops labels that the most promising label of the same state equals or beats in every measure."""
    if len(labels) < 2:
        return labels, lower
    key = (labels.start * tables.makeups + labels.makeup) * resources + labels.left
    order = np.lexsort((lower, key))
    labels, lower, key = labels.take(order), lower[order], key[order]
    leads = np.concatenate([[True], key[1:] != key[:-1]])
    lead = np.nonzero(leads)[0][np.cumsum(leads) - 1]
    beaten = ~leads
    for measure in (labels.open_s, labels.worst_s, labels.sum_s, labels.sync_s, labels.update_s):
        beaten &= measure[lead] <= measure
    return labels.take(~beaten), lower[~beaten]


def best_cuts(reach: Reach, bound_s: float = math.inf) -> tuple[tuple[StageCut, ...] | None, bool]:
    """Returns the stages with the least step time below `bound_s`, or None; and whether this is proven."""
    search = Search(reach, bound_s)
    return search.run(), search.exact
