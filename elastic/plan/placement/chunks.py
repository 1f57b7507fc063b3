"""Seeds that cut the pipeline to suit clusters of uneven size.

Where consecutive stages use the same clusters, each lane between them is a run of near devices, here called a chunk; where they do not,
the pipeline pays for one slow boundary. If the cuts leave runs of, say, 5 and 3 stages, then clusters of 26, 11 and 27 devices consist of
chunks of 5 and 3 without a remainder. For every way to cut, a dynamic programme lays the chunks along the devices in near order so that
the sum of the links inside chunks is least.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice, product
from operator import mul

import numpy as np

from elastic.plan.placement.pairing import Matrix
from elastic.plan.placement.path import Indices

MOST_CUTS = 24
MOST_STATES = 2500


def chunked(order: Indices, boundary: Matrix, stages: int) -> Iterator[Indices]:
    """Yields placements, as devices by slot, of the devices in `order`: per way to cut the stages, equal runs side by side, and mixed."""
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
    """Yields all ways to write `total` as a sum of numbers up to `largest`, in descending order."""
    if not total:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in _partitions(total - first, first):
            yield (first, *rest)


def _states(runs: Counter[int], lanes: int) -> int:
    return int(np.prod([count * lanes + 1 for count in runs.values()], dtype=float))


def _laid(order: Indices, boundary: Matrix, runs: Counter[int], lanes: int) -> dict[int, list[Indices]]:
    """Returns the chunks of each length, as devices: a dynamic programme over the numbers of chunks of each length so far."""
    lengths = sorted(runs, reverse=True)
    needed = [runs[length] * lanes for length in lengths]
    # States are in the order of `product`, so the state with one chunk of a kind less is a fixed distance before.
    back = [int(np.prod([count + 1 for count in needed[kind + 1 :]])) for kind in range(len(lengths))]
    links = np.concatenate([[0.0], np.cumsum(boundary[order[:-1], order[1:]])]).tolist()
    best, last = [0.0], [-1]
    for index, state in enumerate(product(*(range(count + 1) for count in needed))):
        if not index:
            continue
        stop = sum(map(mul, state, lengths))
        least, chosen = math.inf, -1
        for kind, count in enumerate(state):
            if count and (cost := best[index - back[kind]] - links[stop - lengths[kind]]) < least:
                least, chosen = cost, kind
        best.append(least + links[stop - 1])
        last.append(chosen)
    chunks: dict[int, list[Indices]] = {length: [] for length in lengths}
    index, stop = len(best) - 1, len(order)
    while stop:
        kind = last[index]
        chunks[lengths[kind]].append(order[stop - lengths[kind] : stop])
        index, stop = index - back[kind], stop - lengths[kind]
    return chunks


def _grid(chunks: dict[int, list[Indices]], runs: Counter[int], lanes: int, *, mixed: bool) -> Indices:
    """Returns devices by slot: each chunk is one lane of a run. Neighbours share a run, or, if `mixed`, alternate between equal runs."""
    rows: list[Indices] = []
    for length, these in chunks.items():
        cube = np.array(these)
        cube = cube.reshape(lanes, runs[length], length).swapaxes(0, 1) if mixed else cube.reshape(runs[length], lanes, length)
        rows.append(cube.swapaxes(1, 2).reshape(-1, lanes))
    return np.concatenate(rows).reshape(-1)
