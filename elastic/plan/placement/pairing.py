"""Who hands on to whom: the pairing of two consecutive groups whose slowest link is fastest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def bottleneck_pairing(costs: Matrix) -> tuple[float, tuple[int, ...]]:
    """The least bottleneck of a perfect pairing of the rows of a square matrix with its columns, and the column of each row.

    Exact: a threshold grows from the largest of all rows' and columns' least costs. A row that finds no augmenting path below it raises
    it to the cheapest edge that leaves the tree of paths it has searched, which is the least that can help. Rows of bits stand for sets.
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
    """What a search for an augmenting path has reached: rows, and columns as bits."""

    __slots__ = ("columns", "rows")

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.columns = 0


def _below(costs: Matrix, limit: float) -> list[int]:
    """Per row, the columns whose cost is at most `limit`, as bits."""
    packed = np.packbits(costs <= limit, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _augment(row: int, below: Sequence[int], owner: list[int]) -> _Tree | None:
    """Gives `row` a column, moving others if need be: None; or the tree that was searched in vain."""
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
    """The least bottleneck when groups differ in size: every member of the larger has one partner, every one of the smaller an even share.

    `costs` is (larger, smaller). Each of the smaller has `larger // smaller` partners, and `larger % smaller` of them one more.
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
