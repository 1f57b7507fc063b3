"""Chooses the worker that keeps the copy of another worker's run: on another host if there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from elastic.layout.ownership import OwnedRun
from elastic.layout.regions import BLOCK

OwnedRuns = Sequence[OwnedRun]

EXCESS = 1.6
"""A worker keeps its earlier copies up to a limit: this many times the mean, or the largest share one worker owns; plus a block.

When a third worker joins two, the earlier copies are 1.5 times the mean, and stay.
"""


def replica_holders(workers: Sequence[int], hosts: Mapping[int, str] | None = None, *, outlive: bool = False) -> dict[int, int | None]:
    """Maps each worker to the one that keeps its copies: a step along a ring of all workers, which leaves the host if possible.

    `outlive`: state outlives its process, so that copies within a host would be of no use, and there are none.
    """
    host = _host_of(workers, hosts)
    if outlive and len(set(host.values())) == 1:
        return dict.fromkeys(workers)
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(host.values()))}
    ring = sorted(workers, key=lambda worker: ranks[host[worker]])
    step = max(Counter(host.values()).values()) if len(ranks) > 1 else 1
    return {worker: _partner(ring, place, step, host) for place, worker in enumerate(ring)}


def _host_of(workers: Sequence[int], hosts: Mapping[int, str] | None) -> dict[int, int | str]:
    return {worker: worker if hosts is None else hosts[worker] for worker in workers}


def _partner(ring: Sequence[int], place: int, step: int, host: Mapping[int, int | str]) -> int | None:
    worker, other = ring[place], ring[(place + step) % len(ring)]
    if host[other] != host[worker]:
        return other
    # More than half of all workers share this host: the few workers elsewhere take turns to keep their copies.
    elsewhere = [candidate for candidate in ring if host[candidate] != host[worker]]
    if elsewhere:
        return elsewhere[place % len(elsewhere)]
    return other if other != worker else None


def keep_replicas(
    layers: Sequence[tuple[Sequence[int], OwnedRuns]], hosts: Mapping[int, str] | None, *, outlive: bool = False
) -> Iterator[list[tuple[OwnedRun, int | None]]]:
    """Yields the runs of each layer with their replica, given `(members, pieces)` with owners; joins neighbours with equal holders.

    A worker that already has a copy keeps it if it is allowed to and not overloaded; other runs go to the worker that keeps least. A
    layer has at most two runs per member.
    """
    workers = list(dict.fromkeys(worker for members, _ in layers for worker in members))
    keepers = _Keepers(workers, hosts, [piece for _, pieces in layers for piece in pieces], outlive=outlive)
    kept = [[keepers.earlier(piece) for piece in pieces] for _, pieces in layers]
    for (members, pieces), chosen in zip(layers, kept, strict=True):
        for place, piece in enumerate(pieces):
            if chosen[place] is None:
                near = [i for i in (place - 1, place + 1) if 0 <= i < len(pieces) and pieces[i].owner == piece.owner]
                chosen[place] = keepers.new(piece, [chosen[i] for i in near], members)
        joined = _joined(pieces, chosen)
        yield joined if len(joined) <= 2 * len(members) else _one_per_owner(joined)


class _Keepers:
    """Counts the elements that each worker keeps for others so far, and lists which workers may keep a run."""

    def __init__(self, workers: Sequence[int], hosts: Mapping[int, str] | None, pieces: OwnedRuns, *, outlive: bool) -> None:
        self.host = _host_of(workers, hosts)
        self.kept = dict.fromkeys(workers, 0)
        if len(set(self.host.values())) == 1 and not outlive:
            self.host = {worker: worker for worker in workers}
        elsewhere = {name: [worker for worker in workers if self.host[worker] != name] for name in self.host.values()}
        self.allowed = {worker: elsewhere[name] for worker, name in self.host.items()}
        owned: Counter[int | str] = Counter()
        shares: Counter[int] = Counter()
        for piece in pieces:
            owned[self._host(piece)] += piece.elements
            shares[piece.owner] += piece.elements
        self.share = max(shares.values(), default=0)
        # No assignment reaches the mean over all workers if one host owns most elements.
        everything = owned.total() / len(workers)
        self.mean = {name: max(everything, owned[name] / max(len(others), 1)) for name, others in elsewhere.items()}

    def _host(self, piece: OwnedRun) -> int | str:
        return self.host[piece.owner]

    def earlier(self, piece: OwnedRun) -> int | None:
        """Returns the earlier replica, else the earlier owner, if it may keep the copy and is not overloaded by it; else None."""
        owner, replica = piece.had
        limit = max(EXCESS * self.mean[self._host(piece)], self.share) + BLOCK
        for worker in (replica, owner):
            if worker is None or worker not in self.host:
                continue
            if self.host[worker] != self._host(piece) and self.kept[worker] + piece.elements <= limit:
                self.kept[worker] += piece.elements
                return worker
        return None

    def new(self, piece: OwnedRun, beside: Sequence[int | None], members: Sequence[int]) -> int | None:
        """Returns one of `beside`, the holders of neighbouring runs, if that stays within the mean; else the worker that keeps least."""
        allowed = self.allowed[piece.owner]
        near = [worker for worker in allowed if worker in beside]
        if not allowed:
            return None
        chosen = min(near or allowed, key=self.kept.__getitem__)
        if not near or self.kept[chosen] + piece.elements > self.mean[self._host(piece)] + BLOCK:
            chosen = min(allowed, key=lambda worker: (self.kept[worker], worker not in members))
        self.kept[chosen] += piece.elements
        return chosen


def _joined(pieces: OwnedRuns, replicas: Sequence[int | None]) -> list[tuple[OwnedRun, int | None]]:
    joined: list[tuple[OwnedRun, int | None]] = []
    for piece, replica in zip(pieces, replicas, strict=True):
        if joined and (joined[-1][0].owner, joined[-1][1]) == (piece.owner, replica):
            piece = replace(piece, start=joined.pop()[0].start)
        joined.append((piece, replica))
    return joined


def _one_per_owner(runs: Sequence[tuple[OwnedRun, int | None]]) -> list[tuple[OwnedRun, int | None]]:
    """Gives neighbouring runs of one owner the replica of the longest of them, and joins them."""
    joined: list[tuple[OwnedRun, int | None]] = []
    for _, same in groupby(runs, lambda run: run[0].owner):
        group = list(same)
        longest, replica = max(group, key=lambda run: run[0].elements)
        joined.append((replace(longest, start=group[0][0].start, stop=group[-1][0].stop), replica))
    return joined
