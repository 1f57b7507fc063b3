"""Orders stages: an open path through all groups whose edges have the least sum."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elastic.plan.placement.pairing import Matrix

MOST_EXACT = 11
Indices = NDArray[np.intp]


class _Layer(NamedTuple):
    """All sets of some number of groups, and the larger set that each forms with each group outside it."""

    sets: Indices
    source: Indices
    group: Indices
    target: Indices


def shortest_path(costs: Matrix) -> tuple[int, ...]:
    """Returns the path of least cost in symmetric `costs` (groups, groups): exact up to `MOST_EXACT` groups, else a local optimum."""
    if len(costs) <= 2:
        return tuple(range(len(costs)))
    return _held_karp(costs) if len(costs) <= MOST_EXACT else _local(costs)


def path_cost(costs: Matrix, path: tuple[int, ...]) -> float:
    """Returns the sum of the path's edges."""
    return float(costs[list(path[:-1]), list(path[1:])].sum())


def _held_karp(costs: Matrix) -> tuple[int, ...]:
    """Held and Karp (1962): computes, from small sets to large, the best path over every set that ends in each of its groups."""
    groups = len(costs)
    best = np.full((groups, 1 << groups), np.inf)
    best[np.arange(groups), 1 << np.arange(groups)] = 0
    for layer in _layers(groups):
        longer = (best[:, None, layer.sets] + costs[:, :, None]).min(axis=0)
        best[layer.group, layer.target] = longer[layer.group, layer.source]
    left, at = (1 << groups) - 1, int(best[:, -1].argmin())
    path = [at]
    while len(path) < groups:
        left ^= 1 << at
        at = int((best[:, left] + costs[:, at]).argmin())
        path.append(at)
    return tuple(path)


@cache
def _layers(groups: int) -> tuple[_Layer, ...]:
    sets = np.arange(1 << groups)
    sizes = np.array([int(s).bit_count() for s in sets])
    layers: list[_Layer] = []
    for size in range(1, groups):
        these = sets[sizes == size]
        source, group = np.nonzero(~these[:, None] >> np.arange(groups) & 1)
        layers.append(_Layer(these, source, group, these[source] | 1 << group))
    return tuple(layers)


def _local(costs: Matrix) -> tuple[int, ...]:
    """Takes the best nearest-neighbour paths, one from every group, and reverses runs until none helps."""
    starts = sorted((_nearest(costs, start) for start in range(len(costs))), key=lambda path: path_cost(costs, path))
    return min((_improve(costs, path) for path in starts[:2]), key=lambda path: path_cost(costs, path))


def _nearest(costs: Matrix, start: int) -> tuple[int, ...]:
    path, left = [start], np.ones(len(costs), dtype=bool)
    left[start] = False
    while len(path) < len(costs):
        path.append(int(np.where(left, costs[path[-1]], np.inf).argmin()))
        left[path[-1]] = False
    return tuple(path)


def _improve(costs: Matrix, path: tuple[int, ...]) -> tuple[int, ...]:
    """2-opt: reverses the run that gains most until none does; the ends of the path are free."""
    groups = len(costs)
    # A virtual group at both ends, at no cost from anywhere, turns the open path into a closed one.
    padded = np.zeros((groups + 1, groups + 1))
    padded[:groups, :groups] = costs
    order = np.array([groups, *path, groups])
    for _ in range(groups * groups):
        here, after = order[:-1], order[1:]
        edge = padded[here, after]
        gain = edge[:, None] + edge - padded[here[:, None], here] - padded[after[:, None], after]
        first, last = divmod(int(np.triu(gain, 1).argmax()), groups + 1)
        if last <= first or gain[first, last] <= 1e-12:
            break
        order[first + 1 : last + 1] = order[first + 1 : last + 1][::-1]
    return tuple(int(group) for group in order[1:-1])
