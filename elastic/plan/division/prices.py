"""A price for each resource, and the bounds on all partitions that follow from it: a Lagrangian bound."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from elastic.plan.division.coverage import Ints
from elastic.plan.division.tables import Tables

TINY = 1e-12
FINENESS = 16
PRICES = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
"""Seconds per second, for all of a resource. Any choice is correct; a good one excludes more."""


class Prices:
    """Prices of the resources, for a lower bound on the sum over stages. Without prices, every stage would take the fastest makeup.

    A stage that takes at most t seconds and computes for c takes at least c / t of its units. So with a price of `p t` for a unit, the sum
    of all computation is at least `sum over layers of min c (1 + p units) - t p available`, for any p, with t the slowest stage. (A
    Lagrangian bound; p is in seconds per second and unit, one for each resource.)
    """

    def __init__(self, tables: Tables, available: Ints) -> None:
        single = np.arange(tables.layers)
        layer_s = tables.seconds[:, single, single + 1]
        each = [[0.0] if top < 1 else [0.0, *(PRICES / top)] for top in available]
        self.price = np.array(list(product(*each)))
        self.others = tables.micro_batches - 1
        self._priced = self.price[1:]
        used = (layer_s[None] * (self._priced @ tables.units.T)[:, :, None]).min(axis=1).sum(axis=1)
        self._used = used / (self._priced @ available)
        self.slowest_s = float(self._used.max(initial=0.0))
        """A lower bound on the slowest stage if all resources could be shared without limits."""
        worth = self.price @ available
        self.price, worth = self.price[worth < max(self.others, TINY)], worth[worth < max(self.others, TINY)]
        paid = (layer_s[None] * (1 + self.price @ tables.units.T)[:, :, None]).min(axis=1)
        self.before_s = np.concatenate([np.zeros((len(paid), 1)), np.cumsum(paid, axis=1)], axis=1)
        self.weight = self.others - worth
        """(prices,): by how many seconds a step becomes longer for each second that the slowest stage does."""

    def step_s(self, slowest_s: float) -> float:
        """Returns a lower bound on a step with such a slowest stage, without synchronisation and update."""
        return float((self.weight * slowest_s + self.before_s[:, -1]).max())

    def stage_s(self, step_s: float) -> float:
        """Returns an upper bound on the stages of a step of at most `step_s`, without synchronisation and update."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (step_s - self.before_s[:, -1]) / self.weight
        return float(np.nanmin(np.where(self.weight > 0, found, math.inf), initial=step_s))

    def weights(self) -> Ints:
        """Returns whole numbers, about proportional to the prices with the highest bound on the slowest stage."""
        if not len(self._used):
            return np.zeros(self.price.shape[1], dtype=np.int64)
        price = self._priced[int(np.argmax(self._used))]
        return np.rint(FINENESS * price / price.max()).astype(np.int64)

    def telling(self, slowest_s: float) -> Ints:
        """Returns the indices of the price with the tightest bound for such a slowest stage, and of no price."""
        return np.unique([0, int(np.argmax(self.weight * slowest_s + self.before_s[:, -1]))])
