"""Computes the cost of exchanging any two devices: a whole neighbourhood at once, from sums and maxima of the present placement.

The placement is a grid: slot `stage * lanes + lane` holds a device, and the devices of one lane exchange activations. With a fixed lane
per device the cost of a boundary is a maximum over lanes, and the effect of a swap takes O(lanes) for its two groups and O(1) for its (at
most four) links; the maxima over all lanes but two are kept per boundary. `arrangement` finds the best pairing of given groups, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from elastic.plan.placement.pairing import Matrix
from elastic.plan.placement.path import Indices


class Grid:
    """A changing placement. `exchange` and `boundary` are (devices, devices), symmetric, in seconds, with zeros on the diagonal.

    Both are kept in the order of the slots; `boundary` has a virtual stage at both ends, to which links cost nothing.
    """

    def __init__(self, exchange: Matrix, boundary: Matrix, stages: int) -> None:
        self._by_device = exchange, boundary
        self.slots, self.stages = len(exchange), stages
        self.lanes = self.slots // stages
        self.stage, self.lane = np.divmod(np.arange(self.slots), self.lanes)
        self.padded = np.zeros((self.slots + 2 * self.lanes, self.slots + 2 * self.lanes))
        self.devices = np.arange(self.slots)
        self.place(self.devices)

    def place(self, devices: Indices) -> None:
        """Puts `devices[slot]` in each slot."""
        exchange, boundary = self._by_device
        self.devices = devices.copy()
        self.exchange = exchange[np.ix_(devices, devices)]
        self.padded[self.lanes : -self.lanes, self.lanes : -self.lanes] = boundary[np.ix_(devices, devices)]
        self._measure()

    def swap(self, one: int, two: int) -> None:
        """Exchanges the devices of two slots."""
        self.devices[[one, two]] = self.devices[[two, one]]
        self.exchange[[one, two]] = self.exchange[[two, one]]
        self.exchange[:, [one, two]] = self.exchange[:, [two, one]]
        a, b = one + self.lanes, two + self.lanes
        self.padded[[a, b]] = self.padded[[b, a]]
        self.padded[:, [a, b]] = self.padded[:, [b, a]]
        self._measure()

    def _measure(self) -> None:
        stages, lanes = np.arange(self.stages), np.arange(self.lanes)
        self.sums = self.exchange.reshape(self.slots, self.stages, self.lanes).sum(axis=2)
        self.member_s = self.sums[np.arange(self.slots), self.stage].reshape(self.stages, self.lanes)
        self.stage_s = self.member_s.max(axis=1)
        shape = (self.stages, self.lanes, self.stages, self.lanes)
        # [stage, leaving lane, staying lane]: seconds of the member that stays.
        self.staying = self.member_s[:, None, :] - self.exchange.reshape(shape)[stages, :, stages]
        self.staying[:, lanes, lanes] = -np.inf
        inner = self.padded[self.lanes : -self.lanes, self.lanes : -self.lanes]
        self.within = inner.reshape(shape)[stages, :, stages]
        near = np.arange(self.slots + self.lanes)
        self.links = self.padded[near, near + self.lanes].reshape(self.stages + 1, self.lanes)
        self.edge_s = self.links.max(axis=1)
        self.others = self._maxima_without_two()
        self.without = self.others[:, lanes, lanes]
        self.cost_s = float(self.stage_s.max() + 2 * self.edge_s.sum())

    def _maxima_without_two(self) -> Matrix:
        """Returns [boundary, lane, lane]: the largest link of all other lanes (0 if there are none)."""
        edges = np.arange(self.stages + 1)
        order = np.argsort(-self.links, axis=1, kind="stable")[:, :3]
        top = np.zeros((self.stages + 1, 3))
        top[:, : order.shape[1]] = np.take_along_axis(self.links, order, axis=1)
        result = np.empty((self.stages + 1, self.lanes, self.lanes))
        result[:] = top[:, 0, None, None]
        first = order[:, 0]
        result[edges, first] = top[:, 1, None]
        result[edges, :, first] = top[:, 1, None]
        if self.lanes > 1:
            result[edges, first, order[:, 1]] = top[:, 2]
            result[edges, order[:, 1], first] = top[:, 2]
        return result

    def critical(self) -> Indices:
        """Returns the slots of which at least one must change to lower the cost: the slowest group, and the ends of every slowest link."""
        worst = self.links[1:-1].argmax(axis=1) + np.arange(self.stages - 1) * self.lanes
        slowest = int(self.stage_s.argmax()) * self.lanes + np.arange(self.lanes)
        return np.unique(np.concatenate([worst, worst + self.lanes, slowest]))


class SwapCosts(NamedTuple):
    """(rows, slots): the cost in seconds after exchanging slot `rows[k]` with any other, and the change of the sum over groups."""

    cost: Matrix
    total: Matrix


def swap_costs(grid: Grid, rows: Indices) -> SwapCosts:
    """Returns the costs of exchanging the devices of these slots with any slot; for a slot with itself, the value is meaningless."""
    slowest, total = _exchange(grid, rows)
    return SwapCosts(slowest + 2 * (grid.edge_s.sum() + _boundary(grid, rows)), total)


def _exchange(grid: Grid, rows: Indices) -> tuple[Matrix, Matrix]:
    """Returns the slowest group, and the change of the sum over groups."""
    stages, lanes, slots = grid.stages, grid.lanes, grid.slots
    stage = grid.stage[rows]
    columns = grid.exchange[:, rows]
    # The group of rows[k] with the device of slot b instead: the slowest member that stays, and the new one.
    leave = grid.staying[stage, grid.lane[rows]][:, :, None] + grid.exchange.reshape(stages, lanes, slots)[stage]
    here = np.maximum(leave.max(axis=1), grid.sums[:, stage].T - columns.T)
    # The group of slot b with the device of rows[k] instead.
    join = grid.staying[:, :, :, None] + columns.reshape(stages, 1, lanes, len(rows))
    there = np.maximum(join.max(axis=2).reshape(slots, len(rows)), grid.sums[rows][:, grid.stage].T - columns).T
    order = np.argsort(-grid.stage_s, kind="stable")
    top = np.append(grid.stage_s[order], [0.0])
    rest = np.full((stages, stages), top[0])
    rest[order[0]] = rest[:, order[0]] = top[1]
    rest[order[0], order[1]] = rest[order[1], order[0]] = top[2]
    slowest = np.maximum(np.maximum(here, there), rest[stage][:, grid.stage])
    total = here + there - grid.stage_s[stage][:, None] - grid.stage_s[grid.stage]
    same = stage[:, None] == grid.stage
    slowest[same], total[same] = top[0], 0
    return slowest, total


def _boundary(grid: Grid, rows: Indices) -> Matrix:
    """Returns the change of the sum over boundaries, one direction."""
    lanes, slots = grid.lanes, grid.slots
    links, mine = grid.padded[:, lanes : lanes + slots], grid.padded[rows + lanes]
    before, after = grid.without[:-1].reshape(-1), grid.without[1:].reshape(-1)
    edge_before, edge_after = np.repeat(grid.edge_s[:-1], lanes), np.repeat(grid.edge_s[1:], lanes)
    # The device of slot b in the place of rows[k]: its links to the slots before and after; then the reverse.
    take_before = np.maximum(before[rows][:, None], links[rows]) - edge_before[rows][:, None]
    take_after = np.maximum(after[rows][:, None], links[rows + 2 * lanes]) - edge_after[rows][:, None]
    give_before = np.maximum(before, mine[:, :slots]) - edge_before
    give_after = np.maximum(after, mine[:, 2 * lanes :]) - edge_after
    change = take_before + take_after + give_before + give_after
    cube = change.reshape(len(rows), grid.stages, lanes)
    # Slots of neighbouring stages share a boundary, slots of one stage share two: their terms are not independent.
    _neighbouring(grid, rows, 1, take_before + give_after, cube)
    _neighbouring(grid, rows, -1, take_after + give_before, cube)
    _within_stage(grid, rows, cube)
    return change


def _neighbouring(grid: Grid, rows: Indices, step: int, rest: Matrix, change: Matrix) -> None:
    """Sets `change` where slot b is in the stage after (`step` 1) or before (-1) that of rows[k]; `rest` is the sum of other boundaries."""
    stage, lane = grid.stage[rows], grid.lane[rows]
    k = np.flatnonzero((stage + step >= 0) & (stage + step < grid.stages))
    stage, lane = stage[k], lane[k]
    edge, other = stage + (step + 1) // 2, stage + step
    within = grid.within
    # In one lane the two devices only swap the ends of their link.
    shared = np.maximum(np.maximum(within[stage, lane], within[other, lane]), grid.others[edge, lane])
    shared[np.arange(len(k)), lane] = grid.edge_s[edge]
    change[k, other] = rest.reshape(change.shape)[k, other] + shared - grid.edge_s[edge][:, None]


def _within_stage(grid: Grid, rows: Indices, change: Matrix) -> None:
    """Sets `change` where slot b is in the stage of rows[k]."""
    stage, lane, k = grid.stage[rows], grid.lane[rows], np.arange(len(rows))
    size = grid.stages + 2
    links = grid.padded.reshape(size, grid.lanes, size, grid.lanes)
    total = np.zeros((len(rows), grid.lanes))
    for edge, other in ((stage, stage), (stage + 1, stage + 2)):
        crossed = np.maximum(links[other, lane, stage + 1], links[stage + 1, lane, other])
        total += np.maximum(crossed, grid.others[edge, lane]) - grid.edge_s[edge][:, None]
    change[k, stage] = total
