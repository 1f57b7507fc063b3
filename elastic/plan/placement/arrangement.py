"""Finds the best order and pairing of given groups: exact for as many groups as an exact path is (see `path`)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from elastic.plan.placement.pairing import Matrix, bottleneck_pairing
from elastic.plan.placement.path import Indices, path_cost, shortest_path


def boundary_bounds(boundary: Matrix, groups: Indices) -> Matrix:
    """Returns (groups, groups): a lower bound per pairing, the slowest of all members' fastest links. `groups`: (groups, lanes)."""
    number, lanes = groups.shape
    cube = boundary[np.ix_(groups.reshape(-1), groups.reshape(-1))].reshape(number, lanes, number, lanes)
    least = cube.min(axis=3).max(axis=1)
    result = np.maximum(least, least.T)
    np.fill_diagonal(result, 0)
    return result


def best_path(bounds: Matrix, exact: Callable[[int, int], float]) -> tuple[tuple[int, ...], float]:
    """Returns the order of groups whose boundaries, each `exact(i, j)` and at least `bounds[i, j]`, have the least sum; and that sum.

    It computes only boundaries on the best path for the bounds known so far, until that path uses no others.
    """
    known = bounds.copy()
    done = np.eye(len(bounds), dtype=bool)
    while True:
        path = shortest_path(known)
        fresh = [(i, j) for i, j in pairwise(path) if not done[i, j]]
        if not fresh:
            return path, path_cost(known, path)
        for i, j in fresh:
            known[i, j] = known[j, i] = exact(i, j)
            done[i, j] = done[j, i] = True


def arranged(devices: Indices, boundary: Matrix, stages: int) -> Indices:
    """Returns the same groups in the best order, with each group's members in the lanes of the best pairing with the group before."""
    groups = devices.reshape(stages, -1)

    def pairing(i: int, j: int) -> float:
        return bottleneck_pairing(boundary[np.ix_(groups[i], groups[j])])[0]

    path, _ = best_path(boundary_bounds(boundary, groups), pairing)
    result = [groups[path[0]]]
    for group in path[1:]:
        _, partner = bottleneck_pairing(boundary[np.ix_(result[-1], groups[group])])
        result.append(groups[group][list(partner)])
    return np.concatenate(result)


def bound(devices: Indices, exchange: Matrix, boundary: Matrix, stages: int) -> float:
    """Returns a lower bound, in seconds, of the cost of the placement after its groups are arranged: cheap, and close to it."""
    groups = devices.reshape(stages, -1)
    within = exchange[groups[:, :, None], groups[:, None, :]].sum(axis=2).max()
    bounds = boundary_bounds(boundary, groups)
    return float(within + 2 * path_cost(bounds, shortest_path(bounds)))
