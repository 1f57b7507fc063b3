"""Seeds of the search: devices in an order that keeps near ones together, filled into the grid of stages and lanes in tiles.

An order of the devices in which clusters, and clusters of clusters, are contiguous reflects the hierarchy of the network without naming its
levels. A grid filled stage by stage turns every cluster into whole groups (hosts exchange gradients); one filled lane by lane spreads every
cluster over all stages (hosts pass activations on); tiles of some stages by some lanes are everything in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from elastic.plan.placement.pairing import Matrix
from elastic.plan.placement.path import Indices


def near_order(costs: Matrix) -> Indices:
    """Orders the devices so that clusters are contiguous: average linkage; two clusters are joined at their nearest ends."""
    devices = len(costs)
    ends = costs.copy()
    between = costs.copy()
    np.fill_diagonal(between, np.inf)
    runs, sizes = [[device] for device in range(devices)], np.ones(devices)
    kept = 0
    for _ in range(devices - 1):
        one, two = divmod(int(between.argmin()), devices)
        kept, gone = min(one, two), max(one, two)
        runs[kept] = _joined(ends, runs[kept], runs[gone])
        mean = (between[kept] * sizes[kept] + between[gone] * sizes[gone]) / (sizes[kept] + sizes[gone])
        sizes[kept] += sizes[gone]
        between[kept] = between[:, kept] = mean
        between[gone] = between[:, gone] = between[kept, kept] = np.inf
    return np.array(runs[kept], dtype=np.intp)


def _joined(ends: Matrix, one: list[int], two: list[int]) -> list[int]:
    """Joins both runs, each turned so that the nearest ends meet."""
    turned = [(ends[a[-1], b[0]], a, b) for a in (one, one[::-1]) for b in (two, two[::-1])]
    _, a, b = min(turned, key=lambda choice: choice[0])
    return [*a, *b]


def tiled(stages: int, lanes: int) -> Iterator[Indices]:
    """Yields all orders in which the slots `stage * lanes + lane` of the grid are filled in tiles, each once.

    It tries every size of tile (for larger grids, some), tiles along stages or along lanes first (turning at the ends, so that neighbours
    in the order stay neighbours), and the slots inside a tile by stage or by lane.
    """
    stage, lane = np.divmod(np.arange(stages * lanes), lanes)
    seen: set[bytes] = set()
    for height in _sizes(stages):
        for width in _sizes(lanes):
            row, column = stage // height, lane // width
            for outer in ((row, np.where(row % 2, -column, column)), (column, np.where(column % 2, -row, row))):
                for inner in ((stage, lane), (lane, stage)):
                    order = np.lexsort((inner[1], inner[0], outer[1], outer[0]))
                    if order.tobytes() not in seen:
                        seen.add(order.tobytes())
                        yield order


def _sizes(longest: int) -> list[int]:
    """Returns all sizes up to 8, else about as many, evenly spaced in the logarithm."""
    return sorted({round(size) for size in np.geomspace(1, longest, 9)}) if longest > 8 else list(range(1, longest + 1))
