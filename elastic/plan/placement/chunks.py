"""Seeds that cut the pipeline where clusters of uneven size want it cut.

Where consecutive stages draw on the same clusters, each lane between them is a run of near devices, here called a chunk; where they do not,
the pipeline pays for one slow boundary. If the cuts leave runs of, say, 5 and 3 stages, then clusters of 26, 11 and 27 devices are made of
chunks of 5 and 3 without any remainder. For every way to cut, a dynamic programme lays the chunks along the devices in near order so that
the links inside of chunks are fastest in sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice, product
from typing import NamedTuple

import numpy as np

from elastic.plan.placement.pairing import Matrix
from elastic.plan.placement.path import Indices

MOST_CUTS = 24
MOST_STATES = 2500


class _Step(NamedTuple):
    """The cost of the links in all chunks so far, and which kind of chunk is the last of them."""

    cost: float
    kind: int


def chunked(order: Indices, boundary: Matrix, stages: int) -> Iterator[Indices]:
    """Placements, as devices by slot, of the devices in `order`: for every way to cut the stages, with equal runs side by side or mixed."""
    lanes = len(order) // stages
    cuts = sorted(_partitions(stages, stages), key=len) if stages <= 16 else [(stages,), (stages - stages // 2, stages // 2)]
    feasible = (cut for cut in cuts if _states(Counter(cut), lanes) <= MOST_STATES)
    for cut in islice(feasible, MOST_CUTS):
        runs = Counter(cut)
        chunks = _laid(order, boundary, runs, lanes)
        yield _grid(chunks, runs, lanes, mixed=False)
        if max(runs.values()) > 1:
            yield _grid(chunks, runs, lanes, mixed=True)


def _partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of numbers up to `largest`, in descending order."""
    if not total:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in _partitions(total - first, first):
            yield (first, *rest)


def _states(runs: Counter[int], lanes: int) -> int:
    return int(np.prod([count * lanes + 1 for count in runs.values()], dtype=float))


def _laid(order: Indices, boundary: Matrix, runs: Counter[int], lanes: int) -> dict[int, list[Indices]]:
    """The chunks of each length, as devices: state [chunks of each length so far] -> least cost of what they cover of the order."""
    lengths = sorted(runs, reverse=True)
    needed = tuple(runs[length] * lanes for length in lengths)
    links = np.concatenate([[0.0], np.cumsum(boundary[order[:-1], order[1:]])]).tolist()
    best: dict[tuple[int, ...], _Step] = {}
    for state in product(*(range(count + 1) for count in needed)):
        stop = sum(count * length for count, length in zip(state, lengths, strict=True))
        options = [
            _Step(best[_less(state, kind)].cost + links[stop - 1] - links[stop - lengths[kind]], kind)
            for kind, count in enumerate(state)
            if count
        ]
        best[state] = min(options, default=_Step(0.0, -1))
    chunks: dict[int, list[Indices]] = {length: [] for length in lengths}
    state, stop = needed, len(order)
    while stop:
        kind = best[state].kind
        chunks[lengths[kind]].append(order[stop - lengths[kind] : stop])
        state, stop = _less(state, kind), stop - lengths[kind]
    return chunks


def _less(state: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*state[:kind], state[kind] - 1, *state[kind + 1 :])


def _grid(chunks: dict[int, list[Indices]], runs: Counter[int], lanes: int, *, mixed: bool) -> Indices:
    """Devices by slot: each chunk down one lane of a run; chunks that are neighbours in one run, or in runs of equal length by turns."""
    rows: list[Indices] = []
    for length, these in chunks.items():
        cube = np.array(these)
        cube = cube.reshape(lanes, runs[length], length).swapaxes(0, 1) if mixed else cube.reshape(runs[length], lanes, length)
        rows.append(cube.swapaxes(1, 2).reshape(-1, lanes))
    return np.concatenate(rows).reshape(-1)
