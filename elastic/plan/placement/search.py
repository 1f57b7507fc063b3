"""The search: ranks seeds by a bound, and improves the best of them by swaps, in rounds with fewer and fewer of them.

Each step evaluates all swaps of a device that limits the cost (see `Grid.critical`) with any other. It takes the best one, even if that
raises the cost, unless it moves a device back to a stage that it left a few steps ago (tabu search). When nothing has improved for some
steps the groups are arranged again; after several such times the run starts again from its best placement with some random swaps.
Effort is counted in evaluated pairs of devices, so a result depends on the budget and the seed, never on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elastic.plan.placement.arrangement import arranged, bound
from elastic.plan.placement.chunks import chunked
from elastic.plan.placement.network import Mask
from elastic.plan.placement.pairing import Matrix
from elastic.plan.placement.path import MOST_EXACT, Indices
from elastic.plan.placement.seeds import near_order, tiled
from elastic.plan.placement.swaps import Grid, swap_costs

ROUNDS = ((16, 0.4), (5, 0.3), (1, 0.3))
"""For each round: the number of best runs that continue, and their total share of the budget."""

ARRANGED_SEEDS = 24
PATIENCE = 25
RESTART = 4
SHAKE = 4
TENURE = (4, 12)
CALLS = 20_000
"""Effort of a step's own calls, regardless of array sizes: the number of pairs that take equally long."""

MOST_TERMS = 1 << 18
TIE = 1e-3
NOISE = 1e-3
"""Share of the cost: every other run chooses at random between swaps that differ by less, as in annealing."""


class Space:
    """The data of a search: seconds between devices, some of which may be blanks that fill up the smaller groups."""

    def __init__(self, exchange: Matrix, boundary: Matrix, stages: int, blanks: int) -> None:
        self.slots, self.stages = stages * (-(-(len(exchange) + blanks) // stages)), stages
        self.lanes = self.slots // stages
        self.blank: Mask = np.arange(self.slots) >= len(exchange)
        self.exchange, self.boundary = _padded(exchange, blanks), _padded(boundary, blanks)
        # A device without its own partner shares one, at best its nearest.
        nearest = np.where(np.eye(len(boundary)), np.inf, boundary).min(axis=1, initial=np.inf)
        self.boundary[: len(boundary), len(boundary) :] = nearest[:, None]
        self.boundary[len(boundary) :, : len(boundary)] = nearest

    @property
    def arranging(self) -> int:
        """Effort of arranging all groups: their pairings, and their order."""
        order = self.stages << self.stages if self.stages <= MOST_EXACT else 2000 * self.stages * self.stages
        return CALLS + 5 * self.bounding + order

    @property
    def bounding(self) -> int:
        """Effort of one bound: all pairs of devices."""
        return self.slots * self.slots


def _padded(matrix: Matrix, blanks: int) -> Matrix:
    return np.pad(matrix, (0, blanks))


def seeds(space: Space) -> Iterator[Indices]:
    """Yields devices by slot, from the two families of seeds, with blanks in different groups."""
    real = int((~space.blank).sum())
    order = near_order(space.boundary[:real, :real])
    blanks = np.flatnonzero(space.blank)
    order = np.insert(order, np.linspace(0, real, len(blanks) + 1).astype(int)[1:], blanks)
    for slots in tiled(space.stages, space.lanes):
        devices = np.empty(space.slots, dtype=np.intp)
        devices[slots] = order
        yield _one_blank_each(devices, space)
    for devices in chunked(order, space.boundary, space.stages):
        yield _one_blank_each(devices, space)


def _one_blank_each(devices: Indices, space: Space) -> Indices:
    """Swaps surplus blanks of a group with the last devices of groups that have none."""
    if not space.blank.any():
        return devices
    groups = devices.reshape(space.stages, space.lanes).copy()
    blank = space.blank[groups]
    without = [stage for stage in range(space.stages) if not blank[stage].any()]
    for stage in range(space.stages):
        for lane in np.flatnonzero(blank[stage])[1:]:
            other = without.pop()
            groups[stage, lane], groups[other, -1] = groups[other, -1], groups[stage, lane]
    return groups.reshape(-1)


class _SearchRun:
    """One placement under improvement, and its best state so far."""

    def __init__(self, space: Space, devices: Indices, random: np.random.Generator, noise: float) -> None:
        self.space, self.random, self.noise = space, random, noise
        self.grid = Grid(space.exchange, space.boundary, space.stages)
        self.grid.place(devices)
        self.best_s, self.best = self.grid.cost_s, devices
        self.barred = np.zeros((space.slots, space.stages), dtype=np.intp)
        self.steps = self.idle = 0

    def spend(self, budget: int) -> None:
        """Makes steps until `budget` is used up."""
        while budget > 0:
            rows = self._rows()
            budget -= CALLS + len(rows) * self.space.slots * self.space.lanes
            self._step(rows)
            if self.idle and self.idle % PATIENCE == 0:
                budget -= self.space.arranging
                self._refresh()

    def _rows(self) -> Indices:
        rows = self.grid.critical()
        most = max(1, MOST_TERMS // (self.space.slots * self.space.lanes))
        return rows if len(rows) <= most else np.sort(self.random.choice(rows, most, replace=False))

    def _step(self, rows: Indices) -> None:
        self.steps += 1
        grid, costs = self.grid, swap_costs(self.grid, rows)
        score = costs.cost + TIE * costs.total
        if self.noise:
            score -= self.noise * self.best_s * self.random.gumbel(size=score.shape)
        until = np.maximum(self.barred[grid.devices[rows]][:, grid.stage], self.barred[grid.devices][:, grid.stage[rows]].T)
        score[(until > self.steps) & (costs.cost >= self.best_s * (1 - 1e-9))] = np.inf
        score[np.arange(len(rows)), rows] = np.inf
        if self.space.blank.any():
            score[self._crowding(rows)] = np.inf
        row, two = divmod(int(score.argmin()), grid.slots)
        one = int(rows[row])
        for slot in (one, two):
            self.barred[grid.devices[slot], grid.stage[slot]] = self.steps + 1 + self.random.integers(*TENURE)
        grid.swap(one, two)
        self._note()

    def _crowding(self, rows: Indices) -> Mask:
        """Returns (rows, slots): the swaps that bring a blank to a group that already has one."""
        grid = self.grid
        blank = self.space.blank[grid.devices]
        has: Mask = np.repeat(blank.reshape(grid.stages, grid.lanes).any(axis=1), grid.lanes)
        apart = (grid.stage[rows][:, None] != grid.stage) & (blank[rows][:, None] != blank)
        return apart & ((blank[rows][:, None] & has) | (has[rows][:, None] & blank))

    def _note(self) -> None:
        self.idle += 1
        if self.grid.cost_s < self.best_s * (1 - 1e-9):
            self.best_s, self.best, self.idle = self.grid.cost_s, self.grid.devices.copy(), 0

    def _refresh(self) -> None:
        """Arranges the groups of the present placement, or, after several times without success, of the best one with some swaps."""
        if self.idle % (PATIENCE * RESTART) == 0:
            self.grid.place(self._shaken(self.best))
        self.grid.place(arranged(self.grid.devices, self.space.boundary, self.space.stages))
        self._note()

    def _shaken(self, devices: Indices) -> Indices:
        devices = devices.copy()
        real = np.flatnonzero(~self.space.blank[devices])
        for _ in range(SHAKE):
            pair = self.random.choice(real, 2, replace=False)
            devices[pair] = devices[pair[::-1]]
        return devices


def best_found(space: Space, seed: int, budget: int) -> tuple[Indices, ...]:
    """Returns the best placements found, as devices by slot, best first, one per run. Tries at least one seed even without a budget."""
    random = np.random.default_rng(seed)
    runs = [_SearchRun(space, devices, random, NOISE * (number % 2)) for number, devices in enumerate(_starts(space, budget))]
    budget -= 2 * len(runs) * space.arranging
    for most, share in ROUNDS:
        runs = sorted(runs, key=lambda run: run.best_s)[:most] + sorted(runs, key=lambda run: run.best_s)[most:]
        for run in runs[:most]:
            run.spend(int(budget * share / min(most, len(runs))))
    return tuple(run.best for run in sorted(runs, key=lambda run: run.best_s))


def _starts(space: Space, budget: int) -> list[Indices]:
    """Returns the most promising seeds, arranged; only one of those with equal cost."""
    affordable = max(1, budget // (4 * space.bounding))
    distinct = {devices.tobytes(): devices for _, devices in zip(range(affordable), seeds(space), strict=False)}
    ranked = sorted(distinct.values(), key=lambda devices: bound(devices, space.exchange, space.boundary, space.stages))
    most = min(ARRANGED_SEEDS, max(1, budget // (2 * space.arranging)))
    grid, found = Grid(space.exchange, space.boundary, space.stages), dict[float, Indices]()
    for devices in ranked[:most]:
        grid.place(arranged(devices, space.boundary, space.stages))
        found.setdefault(round(grid.cost_s, 9), grid.devices)
    return [found[cost] for cost in sorted(found)]
