"""Chooses the sender of each piece that a worker lacks, so that the last link finishes as early as possible."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from elastic.errors import PlanError
from elastic.layout.runs import Run, lacking
from elastic.plan.relabel import ByteRange

BLOCK = 1 << 20
"""Bytes. A piece that several workers can send is divided in multiples of this; the unit grows above 2^29 blocks in total."""


class Lacking(NamedTuple):
    """`destination` needs the piece, and each of `sources` has it."""

    destination: int
    piece: ByteRange
    sources: tuple[int, ...]


class Send(NamedTuple):
    """`source` sends the piece to `destination`."""

    source: int
    destination: int
    piece: ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """The sends, the seconds until the most loaded link has finished, and a lower bound in seconds for any choice of sources."""

    sends: tuple[Send, ...]
    finish_s: float
    bound_s: float


def missing(held: Mapping[int, Sequence[ByteRange]], needed: Mapping[int, Sequence[ByteRange]]) -> tuple[Lacking, ...]:
    """Returns what each worker needs and does not have, cut where its sources change. Raises PlanError if no worker has it."""
    had, wanted = _by_layer(held), _by_layer(needed)
    found: list[Lacking] = []
    for layer, needs in wanted.items():
        offers = [(worker, run) for worker, runs in sorted(had[layer].items()) for run in runs]
        for lack in lacking(needs, had[layer], offers):
            if not lack.sources:
                raise PlanError(f"no worker has byte {lack.start} of layer {layer}, which worker {lack.destination} needs")
            found.append(Lacking(lack.destination, ByteRange(layer, lack.start, lack.stop), lack.sources))
    return tuple(found)


def _by_layer(pieces: Mapping[int, Sequence[ByteRange]]) -> dict[int, dict[int, list[Run]]]:
    """Returns the runs of each worker in each layer, ascending."""
    found: dict[int, dict[int, list[Run]]] = defaultdict(dict)
    for worker, some in pieces.items():
        for layer, start, stop in sorted(some):
            found[layer].setdefault(worker, []).append((start, stop))
    return found


def balance(lacking: Sequence[Lacking], bytes_per_s: Mapping[int, float], *, block: int = BLOCK) -> Balance:
    """Chooses a source for every block that is lacking, so that the last link finishes as early as possible: exact in whole blocks.

    A worker sends and receives at the same time, each at its `bytes_per_s`. What each worker receives is given. What it sends is a flow
    from pieces to sources whose capacity grows with time; Newton's method on the minimum cut (Radzik 1992) finds the least time. Each cut
    is a set of pieces whose sources together are too slow. Raises PlanError on a piece without source or a rate that is not positive.
    """
    _check_sendable(lacking, bytes_per_s, block)
    kinds: dict[tuple[int, ...], list[Lacking]] = defaultdict(list)
    received: dict[int, int] = defaultdict(int)
    for lack in lacking:
        kinds[tuple(sorted(set(lack.sources)))].append(lack)
        received[lack.destination] += lack.piece.stop - lack.piece.start
    receive_s = max((size / bytes_per_s[worker] for worker, size in received.items()), default=0.0)
    problem = _Flow(kinds, bytes_per_s, block)
    shares, bound_s = problem.solve() if kinds else ([], 0.0)
    sends = [send for lacks, share in zip(kinds.values(), shares, strict=True) for send in _cut(lacks, share, problem.unit)]
    sent: dict[int, int] = defaultdict(int)
    for send in sends:
        sent[send.source] += send.piece.stop - send.piece.start
    send_s = max((size / bytes_per_s[worker] for worker, size in sent.items()), default=0.0)
    return Balance(sends=tuple(sends), finish_s=max(receive_s, send_s), bound_s=max(receive_s, bound_s))


def _check_sendable(lacking: Sequence[Lacking], bytes_per_s: Mapping[int, float], block: int) -> None:
    if block < 1:
        raise PlanError(f"a block has {block} bytes; it must have at least one")
    for lack in lacking:
        if not lack.sources:
            raise PlanError(f"no worker has {lack.piece}, which worker {lack.destination} needs")
    for worker in sorted({worker for lack in lacking for worker in (lack.destination, *lack.sources)}):
        if not 0 < (rate := bytes_per_s.get(worker, 0)) < np.inf:
            raise PlanError(f"worker {worker} has a rate of {rate} bytes/s; to send or receive it needs a finite rate above 0")


class _Flow:
    """The flow problem. A kind is all pieces with the same sources. Nodes: start, kinds, sources, end; flow is in whole blocks."""

    def __init__(self, kinds: Mapping[tuple[int, ...], Sequence[Lacking]], bytes_per_s: Mapping[int, float], block: int) -> None:
        sizes = [[lack.piece.stop - lack.piece.start for lack in lacks] for lacks in kinds.values()]
        self.bytes = np.array([sum(of_kind) for of_kind in sizes], dtype=float)
        self.unit = block * max(1, -(-int(self.bytes.sum()) // block) >> 29)
        self.units = np.array([sum(-(-size // self.unit) for size in of_kind) for of_kind in sizes])
        self.sources = sorted({source for kind in kinds for source in kind})
        place = {source: number for number, source in enumerate(self.sources)}
        self.pairs = np.array([(kind, place[source]) for kind, sources in enumerate(kinds) for source in sources]).reshape(-1, 2)
        self.rate = np.array([bytes_per_s[source] for source in self.sources], dtype=float)

    def solve(self) -> tuple[list[dict[int, int]], float]:
        """Returns, per kind, how many units each source sends; and the largest bound of all cuts, in seconds."""
        kinds, sources = np.ones(len(self.units), dtype=bool), np.ones(len(self.sources), dtype=bool)
        bound_s = 0.0
        while kinds.any():
            bound_s = max(bound_s, float(self.bytes[kinds].sum() / self.rate[sources].sum()))
            flow, kinds, sources = self._maximum(self._capacity(self._least_time(kinds, sources)))
        shares: list[dict[int, int]] = [{} for _ in self.units]
        for (kind, source), units in zip(self.pairs.tolist(), flow.tolist(), strict=True):
            if units:
                shares[kind][self.sources[source]] = units
        return shares, bound_s

    def _capacity(self, seconds: float) -> NDArray[np.int64]:
        return np.floor(seconds * self.rate / self.unit * (1 + 1e-12)).astype(np.int64)

    def _least_time(self, kinds: NDArray[np.bool_], sources: NDArray[np.bool_]) -> float:
        """Returns the least seconds in which these sources can send these kinds in whole units, by bisection over the rounding."""
        units, pace = self.units[kinds].sum(), self.rate[sources].sum() / self.unit
        early, late = units / pace, (units + sources.sum()) / pace
        if self._capacity(early)[sources].sum() >= units:
            return early
        while late - early > 1e-12 * late:
            middle = (early + late) / 2
            early, late = (early, middle) if self._capacity(middle)[sources].sum() >= units else (middle, late)
        return late

    def _maximum(self, capacity: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_]]:
        """Returns the flow of each pair; and, if the flow is incomplete, the kinds and sources on the start's side of a minimum cut."""
        kinds, sources = len(self.units), len(self.sources)
        first, end = kinds + 1, kinds + sources + 1
        rows = np.concatenate([np.zeros(kinds, dtype=int), self.pairs[:, 0] + 1, np.arange(first, end)])
        columns = np.concatenate([np.arange(1, first), self.pairs[:, 1] + first, np.full(sources, end)])
        limits = np.concatenate([self.units, self.units[self.pairs[:, 0]], np.minimum(capacity, self.units.sum())])
        graph = csr_array((limits.astype(np.int32), (rows, columns)), shape=(end + 1, end + 1))
        found = maximum_flow(graph, 0, end)
        flow = found.flow[self.pairs[:, 0] + 1, self.pairs[:, 1] + first]
        reached = np.zeros(end + 1, dtype=bool)
        if found.flow_value < self.units.sum():
            residual = csr_array(graph - found.flow)
            residual.eliminate_zeros()
            reached[breadth_first_order(residual, 0, return_predecessors=False)] = True
        return np.asarray(flow).reshape(-1), reached[1:first], reached[first:end]


def _cut(lacks: Sequence[Lacking], share: Mapping[int, int], unit: int) -> Iterator[Send]:
    """Yields the pieces of one kind, assigned to its sources in turn until each has its units."""
    left = iter(share.items())
    source, units = next(left)
    for destination, piece, _ in lacks:
        at = piece.start
        while at < piece.stop:
            if not units:
                source, units = next(left)
            taken = min(units, -(-(piece.stop - at) // unit))
            stop = min(piece.stop, at + taken * unit)
            yield Send(source, destination, ByteRange(piece.layer, at, stop))
            at, units = stop, units - taken
