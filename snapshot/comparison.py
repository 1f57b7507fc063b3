"""Compares the digests of copies that must be equal, between the workers that hold them.

Copies are digested to detect memory that changes at rest (`rest_digests`). With READY each worker sends a few of these digests, combined:
of its parameters and of those that it has gathered, as of the step before; of its shards and of the replicas that it keeps, as of the step
that replicas have. If any two differ, no worker applies the step, all send the digests themselves, and `judged` finds what is wrong.

- Parameters that an owner and its gatherers have of one step: what most of them have is right, also by the replica if that is of this step.
- If a replica differs, nothing shows which copy is right. What members gathered came from the owner, so it only says what the owner had: if
  the owner was wrong before it sent that, every result since is wrong. Members then go back to a step before these copies. So it is with
  several replicas that agree: the owner sent all of them one gradient, which may have changed after the owner's own update.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.layout.layout import Layout
from elastic.layout.transfer import Role
from elastic.snapshot.rest_digests import Rest

Digests = list[list[Any]]
"""What a worker sends with READY: `[kind, peer, step, digest]` each."""

_OWN, _GATHERED, _SHARDS, _REPLICAS = "own", "gathered", "shards", "replicas"
_PAIRS = {_GATHERED: _OWN, _REPLICAS: _SHARDS}
"""The kinds that must be equal: a worker's copies of a peer's state, and the peer's own."""

NOBODY = -1
"""The peer of a digest that several workers compare theirs with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The digests of one copy, by state. The `owner` is that of the run."""

    worker: int
    owner: int
    role: Role
    layer: int
    start: int
    stop: int
    step: int
    digests: Mapping[str, str]

    def to_json(self) -> list[Any]:
        """One flat list."""
        return [self.worker, self.owner, self.role, self.layer, self.start, self.stop, self.step, self.digests]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Copied:
        """The inverse of `to_json`."""
        worker, owner, role, layer, start, stop, step, digests = data
        return cls(worker=worker, owner=owner, role=role, layer=layer, start=start, stop=stop, step=step, digests=digests)


class Comparison:
    """The copies of one worker in one view that other workers have too, and their digests in `rest`."""

    def __init__(self, worker: int, layout: Layout, rest: Rest) -> None:
        self._worker, self._rest = worker, rest
        self._runs: dict[Role, list[tuple[int, int, int, int]]] = {"live": [], "gathered": [], "replica": []}
        self._by_peer: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for layer in (each for each in layout.layers if each.layer not in layout.model.frozen):
            for interval in layer.intervals:
                run, place = (layer.layer, interval.start, interval.stop, interval.owner), (layer.layer, interval.start)
                if interval.owner == worker:
                    self._runs["live"].append(run)
                    self._by_peer[_OWN, NOBODY].append(place)
                    for holder in interval.replicas:
                        self._by_peer[_SHARDS, holder].append(place)
                elif worker in layer.members:
                    self._runs["gathered"].append(run)
                    self._by_peer[_GATHERED, interval.owner].append(place)
                if worker in interval.replicas:
                    self._runs["replica"].append(run)
                    self._by_peer[_REPLICAS, interval.owner].append(place)

    def digests(self, step: int, before: int) -> Digests:
        """Returns the combined digests of parameters as of `step`, and of shards as of the step `before` that replicas have."""
        shards: Role = "live" if before == step else "previous"
        sources: dict[str, tuple[Role, int]] = {
            _OWN: ("live", step),
            _GATHERED: ("gathered", step),
            _SHARDS: (shards, before),
            _REPLICAS: ("replica", before),
        }
        found = []
        for (kind, peer), places in self._by_peer.items():
            role, when = sources[kind]
            value = self._rest.combined(role, when, places, parameters=kind in (_OWN, _GATHERED))
            if value is not None:
                found.append([kind, peer, when, value])
        return found

    def copies(self, step: int, before: int) -> list[Copied]:
        """Returns the copies behind `digests`, one by one."""
        wanted: list[tuple[Role, Role, int]] = [("live", "live", step), ("gathered", "gathered", step), ("replica", "replica", before)]
        if before != step:
            wanted.append(("live", "previous", before))
        found = []
        for runs, role, when in wanted:
            known = self._rest.checksums_of(role, when)
            for layer, start, stop, owner in self._runs[runs]:
                if self._rest.takes(when, layer) and (layer, start) in known:
                    where = {"layer": layer, "start": start, "stop": stop, "step": when}
                    found.append(Copied(worker=self._worker, owner=owner, role=role, digests=known[layer, start], **where))
        return found


def unlike(told: Mapping[int, Digests]) -> bool:
    """Returns whether any digests, by worker, differ that must be equal."""
    known = {(worker, kind, peer, step): value for worker, digests in told.items() for kind, peer, step, value in digests}
    for (worker, kind, peer, step), value in known.items():
        if kind in _PAIRS:
            own = known.get((peer, _PAIRS[kind], NOBODY if kind == _GATHERED else worker, step))
            if own not in (None, value):
                return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Copies of one state of a run, as of `step`, that differ. `wrong` are those that most others contradict; empty if it is unknown."""

    state: str
    layer: int
    start: int
    stop: int
    step: int
    copies: tuple[Copied, ...]
    wrong: tuple[Copied, ...] = ()


def judged(copies: Iterable[Copied]) -> list[Difference]:
    """Returns what differs among the copies of all workers, and which copies are wrong as far as that is certain."""
    same: dict[tuple[int, int, int, int, str], list[Copied]] = defaultdict(list)
    for copy in copies:
        for state in copy.digests:
            same[copy.layer, copy.start, copy.stop, copy.step, state].append(copy)
    found = []
    for (layer, start, stop, step, state), having in sorted(same.items(), key=lambda each: each[0]):
        if len({copy.digests[state] for copy in having}) == 1:
            continue
        replicas = [copy for copy in having if copy.role == "replica"]
        witnesses = [*(copy for copy in having if copy.role != "replica"), *replicas[:1]]  # replicas got one and the same gradient
        (value, most), *_ = Counter(copy.digests[state] for copy in witnesses).most_common()
        decided = 2 * most > len(witnesses) and all(copy.digests[state] == value for copy in replicas)
        wrong = tuple(copy for copy in having if copy.digests[state] != value) if decided else ()
        found.append(Difference(state=state, layer=layer, start=start, stop=stop, step=step, copies=tuple(having), wrong=wrong))
    return found
