"""Pairs the members of two consecutive groups so that the slowest link of a pair is as fast as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def bottleneck_pairing(costs: Matrix) -> tuple[float, tuple[int, ...]]:
    """Returns the least bottleneck of a perfect pairing of the rows of a square matrix with its columns, and the column of each row.

    Exact: a threshold grows from the largest of all rows' and columns' least costs. If a row finds no augmenting path below the threshold,
    it is raised to the cheapest edge that leaves the searched tree of paths, the least that can help. Sets are stored as bits.
    """
    rows: list[list[float]] = costs.tolist()
    limit = float(max(costs.min(axis=1).max(), costs.min(axis=0).max()))
    below = _below(costs, limit)
    owner: list[int] = [-1] * len(rows)
    for row in range(len(rows)):
        while (seen := _augment(row, below, owner)) is not None:
            limit = min(rows[i][j] for i in seen.rows for j in range(len(rows)) if not seen.columns >> j & 1)
            below = _below(costs, limit)
    partner = [0] * len(rows)
    for column, row in enumerate(owner):
        partner[row] = column
    return limit, tuple(partner)


class _Tree:
    """The rows, and columns as bits, that a search for an augmenting path has reached."""

    __slots__ = ("columns", "rows")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns = 0


def _below(costs: Matrix, limit: float) -> list[int]:
    """Returns, per row, the columns whose cost is at most `limit`, as bits."""
    packed = np.packbits(costs <= limit, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _augment(row: int, below: Sequence[int], owner: list[int]) -> _Tree | None:
    """Gives `row` a column, moving other rows if necessary, and returns None; if impossible, returns the searched tree."""
    tree, came, free = _Tree(), {}, -1
    tree.rows.append(row)
    for at in tree.rows:
        fresh = below[at] & ~tree.columns
        tree.columns |= fresh
        while fresh:
            column = (fresh & -fresh).bit_length() - 1
            fresh &= fresh - 1
            came[column] = at
            if owner[column] < 0:
                free = column
                break
            tree.rows.append(owner[column])
        if free >= 0:
            break
    if free < 0:
        return tree
    held = {at: column for column, at in enumerate(owner) if at >= 0}
    column = free
    while True:
        at = came[column]
        owner[column] = at
        if at == row:
            return None
        column = held[at]


def uneven_pairing_s(costs: Matrix) -> float:
    """Returns the least bottleneck for groups of different size: the members of the larger are shared evenly by those of the smaller.

    `costs` is (larger, smaller). Each member of the smaller has `larger // smaller` partners; `larger % smaller` of them have one more.
    """
    larger, smaller = costs.shape
    share, more = divmod(larger, smaller)
    if not more:
        return bottleneck_pairing(np.repeat(costs, share, axis=1))[0]
    dead = float(costs.max()) + 1
    # Rows that pad the matrix to a square may only take places beyond the even share.
    padding = np.full((smaller - more, smaller * (share + 1)), dead)
    padding[:, smaller * share :] = 0
    return bottleneck_pairing(np.vstack([np.hstack([np.repeat(costs, share, axis=1), costs]), padding]))[0]
