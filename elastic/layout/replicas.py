"""Chooses the workers that keep copies of another worker's run: each on another host, and in another rack, as far as there are enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from elastic.layout.ownership import OwnedRun
from elastic.layout.regions import BLOCK

OwnedRuns = Sequence[OwnedRun]

Holders = tuple[int, ...]
"""The workers that keep copies of a run for its owner."""

EXCESS = 1.6
"""A worker keeps its earlier copies up to a limit: this many times the mean, or the largest share one worker owns; plus a block. The limit
is for each copy of a run.

When a third worker joins two, the earlier copies are 1.5 times the mean, and stay.
"""


@dataclass(frozen=True)
class Spots:
    """Where workers are. `places` is the rack of each, or its host where racks say nothing; no two copies share one while there are enough.

    `hosts` is the host of each, if `places` are racks: no two copies ever share one. `copies` is how many there should be in all, the
    owner's included. `outlive`: state outlives its process, so copies within a host would be of no use. Otherwise, if all workers share a
    place, each of them counts as a place.
    """

    workers: Sequence[int]
    places: Mapping[int, str] | None = None
    hosts: Mapping[int, str] | None = None
    copies: int = 2
    outlive: bool = False

    @cached_property
    def place(self) -> dict[int, int | str]:
        """The place of each worker."""
        named = self.places
        if named is None or (not self.outlive and len({named[worker] for worker in self.workers}) == 1):
            return {worker: worker for worker in self.workers}
        return {worker: named[worker] for worker in self.workers}

    @cached_property
    def host(self) -> dict[int, int | str]:
        """The host of each worker, or its place."""
        named = self.hosts
        if named is None or len(set(self.place.values())) == len(self.workers):
            return self.place
        return {worker: named[worker] for worker in self.workers}

    @cached_property
    def replicas(self) -> int:
        """How many workers keep a copy of each run."""
        return min(self.copies, len(set(self.host.values()))) - 1

    def allowed(self, taken: Sequence[int]) -> dict[int, None]:
        """Returns the workers that may keep the next copy of a run, as keys, given those that have one."""
        used = frozenset(self.host[worker] for worker in taken)
        if used not in self._allowed:
            places = {self.place[worker] for worker in taken}
            elsewhere = [worker for worker in self.workers if self.host[worker] not in used]
            apart = [worker for worker in elsewhere if self.place[worker] not in places]
            self._allowed[used] = dict.fromkeys(apart or elsewhere)
        return self._allowed[used]

    @cached_property
    def _allowed(self) -> dict[frozenset[int | str], dict[int, None]]:
        return {}

    def suit(self, owner: int, replicas: Holders) -> bool:
        """Returns whether these workers are as many as there should be, and as far apart as they can be."""
        taken = (owner, *replicas)
        if len(replicas) != self.replicas or any(worker not in self.host for worker in taken):
            return False
        return all(worker in self.allowed(taken[:number]) for number, worker in enumerate(taken) if number)


def replica_holders(spots: Spots) -> dict[int, Holders]:
    """Maps each worker to those that keep its copies: steps along a ring of all workers, which leave the host if possible."""
    if not spots.replicas:
        return dict.fromkeys(spots.workers, ())
    place = spots.place
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(place.values()))}
    ring = sorted(spots.workers, key=lambda worker: ranks[place[worker]])
    step = max(Counter(place.values()).values())
    found: dict[int, Holders] = {worker: (_partner(ring, number, step, place),) for number, worker in enumerate(ring)}
    kept = Counter(holder for holders in found.values() for holder in holders)
    at = {worker: number for number, worker in enumerate(ring)}
    for rank in range(2, spots.replicas + 1):
        for number, worker in enumerate(ring):
            ideal = number + rank * step
            allowed = spots.allowed((worker, *found[worker]))
            chosen = min(allowed, key=lambda other, ideal=ideal: (kept[other], (at[other] - ideal) % len(ring)))
            kept[chosen] += 1
            found[worker] += (chosen,)
    return {worker: found[worker] for worker in spots.workers}


def _partner(ring: Sequence[int], number: int, step: int, place: Mapping[int, int | str]) -> int:
    worker, other = ring[number], ring[(number + step) % len(ring)]
    if place[other] != place[worker]:
        return other
    # More than half of all workers share this place: the few workers elsewhere take turns to keep their copies.
    elsewhere = [candidate for candidate in ring if place[candidate] != place[worker]]
    return elsewhere[number % len(elsewhere)]


def keep_replicas(layers: Sequence[tuple[Sequence[int], OwnedRuns]], spots: Spots) -> Iterator[list[tuple[OwnedRun, Holders]]]:
    """Yields the runs of each layer with their replicas, given `(members, pieces)` with owners; joins neighbours with equal holders.

    A worker that already has a copy keeps it if it is allowed to and not overloaded; other runs go to the worker that keeps least. A
    layer has at most two runs per member.
    """
    keepers = _Keepers(spots, [piece for _, pieces in layers for piece in pieces])
    found: list[list[Holders]] = [[()] * len(pieces) for _, pieces in layers]
    for _ in range(spots.replicas):
        found = _one_more(layers, keepers, found)
    for (members, pieces), holders in zip(layers, found, strict=True):
        joined = _joined(pieces, holders)
        yield joined if len(joined) <= 2 * len(members) else _one_per_owner(joined)


def _one_more(
    layers: Sequence[tuple[Sequence[int], OwnedRuns]], keepers: _Keepers, found: Sequence[Sequence[Holders]]
) -> list[list[Holders]]:
    """Returns the holders of each piece with one more."""
    more: list[list[Holders]] = []
    kept = [
        [keepers.earlier(piece, having) for piece, having in zip(pieces, holders, strict=True)]
        for (_, pieces), holders in zip(layers, found, strict=True)
    ]
    for (members, pieces), holders, chosen in zip(layers, found, kept, strict=True):
        for place, piece in enumerate(pieces):
            if chosen[place] is None:
                near = [i for i in (place - 1, place + 1) if 0 <= i < len(pieces) and pieces[i].owner == piece.owner]
                beside = [*(chosen[i] for i in near), *(holder for i in near for holder in holders[i])]
                chosen[place] = keepers.new(piece, holders[place], beside, members)
        pairs = zip(holders, chosen, strict=True)
        more.append([(*having, worker) for having, worker in pairs if worker is not None])
    return more


class _Keepers:
    """Counts the elements that each worker keeps for others so far, and lists which workers may keep a run."""

    def __init__(self, spots: Spots, pieces: OwnedRuns) -> None:
        self._spots = spots
        self.kept = dict.fromkeys(spots.workers, 0)
        owned: Counter[int | str] = Counter()
        shares: Counter[int] = Counter()
        for piece in pieces:
            owned[spots.place[piece.owner]] += piece.elements
            shares[piece.owner] += piece.elements
        self.share = max(shares.values(), default=0)
        # No assignment reaches the mean over all workers if one place owns most elements.
        everything = owned.total() / len(spots.workers)
        self.mean = {
            spots.place[worker]: max(everything, owned[spots.place[worker]] / max(len(spots.allowed((worker,))), 1))
            for worker in spots.workers
        }

    def earlier(self, piece: OwnedRun, holders: Holders) -> int | None:
        """Returns an earlier replica's holder, else the earlier owner, if it may keep the copy and is not overloaded by it; else None."""
        limit = (len(holders) + 1) * max(EXCESS * self._mean(piece), self.share) + BLOCK
        allowed = self._spots.allowed((piece.owner, *holders))
        for worker in (*piece.had[1:], piece.had[0]):
            if worker in allowed and self.kept[worker] + piece.elements <= limit:
                self.kept[worker] += piece.elements
                return worker
        return None

    def new(self, piece: OwnedRun, holders: Holders, beside: Sequence[int | None], members: Sequence[int]) -> int:
        """Returns one of `beside`, the holders of neighbouring runs, if that stays within the mean; else the worker that keeps least."""
        allowed = self._spots.allowed((piece.owner, *holders))
        near = [worker for worker in allowed if worker in beside]
        chosen = min(near or allowed, key=self.kept.__getitem__)
        if not near or self.kept[chosen] + piece.elements > (len(holders) + 1) * self._mean(piece) + BLOCK:
            chosen = min(allowed, key=lambda worker: (self.kept[worker], worker not in members))
        self.kept[chosen] += piece.elements
        return chosen

    def _mean(self, piece: OwnedRun) -> float:
        return self.mean[self._spots.place[piece.owner]]


def _joined(pieces: OwnedRuns, replicas: Sequence[Holders]) -> list[tuple[OwnedRun, Holders]]:
    joined: list[tuple[OwnedRun, Holders]] = []
    for piece, holders in zip(pieces, replicas, strict=True):
        if joined and joined[-1][0].owner == piece.owner and set(joined[-1][1]) == set(holders):
            before, holders = joined.pop()
            piece = replace(piece, start=before.start)
        joined.append((piece, holders))
    return joined


def _one_per_owner(runs: Sequence[tuple[OwnedRun, Holders]]) -> list[tuple[OwnedRun, Holders]]:
    """Gives neighbouring runs of one owner the replicas of the longest of them, and joins them."""
    joined: list[tuple[OwnedRun, Holders]] = []
    for _, same in groupby(runs, lambda run: run[0].owner):
        group = list(same)
        longest, holders = max(group, key=lambda run: run[0].elements)
        joined.append((replace(longest, start=group[0][0].start, stop=group[-1][0].stop), holders))
    return joined
