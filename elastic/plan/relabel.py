"""Assigns the remaining workers to the slots of a new plan so that least state moves.

`assignment.assign` does this for whole layers. There the members of a stage are equal, two ordered cuts of the same layers overlap in a
chain, and a small exact recursion keeps workers in order. Here slots differ: each needs its own runs of layers (the interval that it owns,
and the one that it replicates), so this is a linear assignment over all workers and slots. Use `relabel` if every slot has its own runs,
and `assign` if a plan has only stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from elastic.errors import PlanError


class ByteRange(NamedTuple):
    """The bytes `[start, stop)` of a layer's state. Each state of a layer has its own layer number."""

    layer: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Relabelling:
    """The worker of each slot, and how many of the bytes that slots need their workers have, and lack."""

    workers: tuple[int, ...]
    kept_bytes: int
    moved_bytes: int


def relabel(held: Mapping[int, Sequence[ByteRange]], slots: Sequence[Sequence[ByteRange]]) -> Relabelling:
    """Assigns workers to slots so that the fewest bytes must move: exact.

    `held` maps workers to disjoint pieces (none for a worker that joins); `slots` lists the disjoint pieces that each slot needs. Surplus
    workers are left out. Raises PlanError if there are fewer workers than slots, and on pieces that are empty or overlap in one place.
    """
    workers = sorted(held)
    if len(workers) < len(slots):
        raise PlanError(f"{len(slots)} slots need as many workers, and there are {len(workers)}")
    worth = kept_bytes([held[worker] for worker in workers], slots)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    taken = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    kept = int(worth[rows, columns].sum())
    needed = sum(piece.stop - piece.start for slot in slots for piece in slot)
    return Relabelling(workers=tuple(workers[taken[slot]] for slot in range(len(slots))), kept_bytes=kept, moved_bytes=needed - kept)


def kept_bytes(held: Sequence[Sequence[ByteRange]], slots: Sequence[Sequence[ByteRange]]) -> NDArray[np.int64]:
    """Returns (workers, slots): how many of the bytes that the slot needs the worker has.

    Equal pieces of many workers are compared once: the effort depends on the number of different pieces and of their overlaps.
    """
    has, had = _incidence(held)
    needs, wanted = _incidence(slots)
    # Compares all pairs of a layer without a loop: `wanted` is sorted by layer, and each of `had` meets a run of it.
    first, last = (np.searchsorted(wanted[:, 0], had[:, 0], side=side) for side in ("left", "right"))
    met = last - first
    one = np.repeat(np.arange(len(had)), met)
    two = np.arange(met.sum()) + np.repeat(first - np.cumsum(met) + met, met)
    overlap = np.minimum(had[one, 2], wanted[two, 2]) - np.maximum(had[one, 1], wanted[two, 1])
    some = overlap > 0
    shared = csr_array((overlap[some], (one[some], two[some])), shape=(len(had), len(wanted)))
    return (has @ shared @ needs.T).toarray()


def _incidence(places: Sequence[Sequence[ByteRange]]) -> tuple[csr_array, NDArray[np.int64]]:
    """Returns (places, pieces) of ones and zeros, and the distinct pieces, ascending, as (pieces, 3). Raises as `relabel` does."""
    flat = chain.from_iterable(chain.from_iterable(places))
    pieces = np.fromiter(flat, dtype=np.int64).reshape(-1, 3)
    place = np.repeat(np.arange(len(places)), [len(of_place) for of_place in places])
    _check(pieces, place)
    order = np.lexsort(pieces.T[::-1])
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (pieces[order[1:]] != pieces[order[:-1]]).any(axis=1)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.cumsum(fresh) - 1
    ones = np.ones(len(order), dtype=np.int64)
    return csr_array((ones, (place, number)), shape=(len(places), int(fresh.sum()))), pieces[order[fresh]]


def _check(pieces: NDArray[np.int64], place: NDArray[np.int64]) -> None:
    for bad in np.flatnonzero((pieces[:, 1] < 0) | (pieces[:, 2] <= pieces[:, 1]))[:1]:
        raise PlanError(f"{ByteRange(*pieces[bad].tolist())} has no bytes: it must start at 0 or later and stop after its start")
    order = np.lexsort((pieces[:, 1], pieces[:, 0], place))
    one, two = order[:-1], order[1:]
    within = (place[one] == place[two]) & (pieces[one, 0] == pieces[two, 0])
    for bad in np.flatnonzero(within & (pieces[two, 1] < pieces[one, 2]))[:1]:
        pair = " and ".join(str(ByteRange(*pieces[at].tolist())) for at in (one[bad], two[bad]))
        raise PlanError(f"{pair} are in one place and overlap: join them")
