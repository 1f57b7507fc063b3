"""Compares the digests of copies that must be equal, between the workers that hold them.

Copies are digested to detect memory that changes at rest (`rest_digests`). With READY each worker sends a few of these digests, combined:
of its parameters and of those that it has gathered, as of the step before; of its shards and of the replicas that it keeps, as of the step
that replicas have. If any two differ, no worker applies the step, all send the digests themselves, and `judged` finds what is wrong.

- Parameters that an owner and its gatherers have of one step: what most of them have is right, also by the replica if that is of this step.
- If a replica differs, nothing shows which copy is right. What members gathered came from the owner, so it only says what the owner had: if
  the owner was wrong before it sent that, every result since is wrong. Members then go back to a step before these copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.layout.layout import Layout
from elastic.layout.transfer import PARAM, Role
from elastic.memory.raw import as_bytes, checksum
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
        self._runs: dict[Role, list[tuple[int, int, int, int, int | None]]] = {"live": [], "gathered": [], "replica": []}
        for layer in layout.layers:
            for interval in layer.intervals:
                run = layer.layer, interval.start, interval.stop, interval.owner, interval.replica
                if interval.owner == worker:
                    self._runs["live"].append(run)
                elif worker in layer.members:
                    self._runs["gathered"].append(run)
                if interval.replica == worker:
                    self._runs["replica"].append(run)

    def digests(self, step: int, before: int) -> Digests:
        """Returns the combined digests of parameters as of `step`, and of shards as of the step `before` that replicas have."""
        live, shards = self._rest.checksums_of("live", step), self._rest.checksums_of("live" if before == step else "previous", before)
        gathered, replicas = self._rest.checksums_of("gathered", step), self._rest.checksums_of("replica", before)
        holders = {holder for *_, holder in self._runs["live"] if holder is not None}
        found = [
            (_OWN, NOBODY, step, self._combined("live", step, live, [PARAM])),
            *((_GATHERED, owner, step, self._combined("gathered", step, gathered, [PARAM], owner)) for owner in self._owners("gathered")),
            *((_SHARDS, holder, before, self._combined("live", before, shards, None, holder=holder)) for holder in sorted(holders)),
            *((_REPLICAS, owner, before, self._combined("replica", before, replicas, None, owner)) for owner in self._owners("replica")),
        ]
        return [list(each) for each in found if each[-1] is not None]

    def _owners(self, role: Role) -> list[int]:
        return sorted({owner for *_, owner, _ in self._runs[role]})

    def _combined(
        self,
        role: Role,
        step: int,
        known: Mapping[tuple[int, int], Mapping[str, str]],
        states: Sequence[str] | None,
        owner: int | None = None,
        holder: int | None = None,
    ) -> str | None:
        """Returns one digest of the copies whose turn it is; None if there are none, or one is unknown."""
        parts: list[str] = []
        for layer, start, _, its_owner, its_holder in self._runs[role]:
            if not self._rest.takes(step, layer) or owner not in (None, its_owner) or holder not in (None, its_holder):
                continue
            checksums = known.get((layer, start))
            if checksums is None:
                return None
            parts += [f"{layer}:{start}:{state}{checksums[state]}" for state in sorted(states or checksums)]
        return checksum(as_bytes("".join(parts).encode())) if parts else None

    def copies(self, step: int, before: int) -> list[Copied]:
        """Returns the copies behind `digests`, one by one."""
        wanted: list[tuple[Role, Role, int]] = [("live", "live", step), ("gathered", "gathered", step), ("replica", "replica", before)]
        if before != step:
            wanted.append(("live", "previous", before))
        found = []
        for runs, role, when in wanted:
            known = self._rest.checksums_of(role, when)
            for layer, start, stop, owner, _ in self._runs[runs]:
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
        counts = Counter(copy.digests[state] for copy in having)
        if len(counts) == 1:
            continue
        (value, most), *_ = counts.most_common()
        decided = 2 * most > len(having) and not any(copy.role == "replica" and copy.digests[state] != value for copy in having)
        wrong = tuple(copy for copy in having if copy.digests[state] != value) if decided else ()
        found.append(Difference(state=state, layer=layer, start=start, stop=stop, step=step, copies=tuple(having), wrong=wrong))
    return found
