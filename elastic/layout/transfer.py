"""Computes what must move between workers so that a new layout holds. Recovery, scaling, saving and loading all use it.

A `Holding` states that a worker has (or must have) one state of one run. A layout *needs* a set of holdings. Whatever a worker
needs and does not have, one worker that has it sends to it, once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import pairwise
from typing import Any, Literal

from elastic.errors import CoverageLost
from elastic.layout.layout import Layout
from elastic.layout.regions import BLOCK, MASTER, PARAM
from elastic.layout.runs import Lack, Run, Senders, gaps, joined, shared

Role = Literal["live", "previous", "replica", "previous replica", "gathered", "kept"]

PIECE = 256 * BLOCK
"""Elements. A longer run that several workers can send is divided between them in pieces of this length."""

# A gathered parameter is as fresh as its owner's; using all workers that have it balances the senders.
_PREFERENCE: dict[Role, int] = {"live": 0, "gathered": 0, "previous": 1, "replica": 2, "previous replica": 3, "kept": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """`worker` has the elements `[start, stop)` of `state` of `layer`.

    An owner's role is live, previous (the copy from the step before) or kept (an older one); another worker's is replica, previous
    replica (as of the step before), or gathered parameter.
    """

    worker: int
    state: str
    layer: int
    start: int
    stop: int
    role: Role

    def to_json(self) -> list[Any]:
        """Writes one flat list."""
        return [self.worker, self.state, self.layer, self.start, self.stop, self.role]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Holding:
        """The inverse of `to_json`."""
        worker, state, layer, start, stop, role = data
        return cls(worker=worker, state=state, layer=layer, start=start, stop=stop, role=role)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """`source` sends the elements `[start, stop)` of `state` of `layer` to `destination`."""

    source: int
    destination: int
    state: str
    layer: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Length of the run."""
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.source}>{self.destination} {self.state} {self.layer}[{self.start}:{self.stop}]"

    def to_json(self) -> list[Any]:
        """Writes one flat list."""
        return [self.source, self.destination, self.state, self.layer, self.start, self.stop]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Transfer:
        """The inverse of `to_json`."""
        source, destination, state, layer, start, stop = data
        return cls(source=source, destination=destination, state=state, layer=layer, start=start, stop=stop)


def needs(layout: Layout, states: Sequence[str], of: Collection[int] | None = None) -> tuple[Holding, ...]:
    """Returns what every worker (or each worker in `of`) must hold under `layout`. `states` are names; `PARAM` is the parameter itself.

    Parameter: every member of the stage needs the whole layer; every member of a stage that uses a tied parameter needs that parameter's
    run of the home layer; a replica needs its interval, to repeat the owner's update. Any other state: the owner and the replicas need
    their interval. A worker may need a run twice, as a member and as a replica; it is sent only once.
    """
    return tuple(
        need
        for layer in range(len(layout.layers))
        for state in states
        if layout.model.has(layer, state)
        for need in (_parameter_needs(layout, layer, of) if state == PARAM else _state_needs(layout, layer, state, of))
    )


def _parameter_needs(layout: Layout, layer: int, of: Collection[int] | None = None) -> Iterator[Holding]:
    home = layout.layers[layer]
    size = layout.model.layers[layer].size
    if size:
        for worker in home.members:
            if of is None or worker in of:
                yield Holding(worker=worker, state=PARAM, layer=layer, start=0, stop=size, role="gathered")
    for interval in home.intervals:
        for worker in interval.replicas:
            if of is None or worker in of:
                yield Holding(worker=worker, state=PARAM, layer=layer, start=interval.start, stop=interval.stop, role="replica")
    tied = dict.fromkeys(
        (worker, start, stop)
        for user in layout.layers[layout.model.layers[layer].module + 1 : layout.model.depth]
        for base, start, stop in layout.model.tied_runs(user.layer)
        for worker in user.members
        if base == layer and start < stop and worker not in home.members
    )
    for worker, start, stop in tied:
        if of is not None and worker not in of:
            continue
        yield Holding(worker=worker, state=PARAM, layer=layer, start=start, stop=stop, role="gathered")


def updates(layout: Layout, layer: int, worker: int) -> Iterator[Transfer]:
    """Yields the parameter transfers of a layer that `worker` takes part in after every step: each run goes from its owner to its users."""
    if layout.model.layers[layer].frozen:
        return
    wanted = [(need.worker, (need.start, need.stop)) for need in _parameter_needs(layout, layer) if need.role == "gathered"]
    for interval in layout.layers[layer].intervals:
        for member, run in wanted:
            if member != interval.owner and worker in (member, interval.owner) and (both := shared(run, interval.run)):
                yield Transfer(source=interval.owner, destination=member, state=PARAM, layer=layer, start=both[0], stop=both[1])


def _state_needs(layout: Layout, layer: int, state: str, of: Collection[int] | None) -> Iterator[Holding]:
    for interval in layout.layers[layer].intervals:
        if of is None or interval.owner in of:
            yield Holding(worker=interval.owner, state=state, layer=layer, start=interval.start, stop=interval.stop, role="live")
        for worker in interval.replicas:
            if of is None or worker in of:
                yield Holding(worker=worker, state=state, layer=layer, start=interval.start, stop=interval.stop, role="replica")


def holdings_of(layout: Layout, states: Sequence[str], alive: Collection[int]) -> tuple[Holding, ...]:
    """Returns what the workers `alive` hold while `layout` is in force: exactly its needs."""
    return tuple(holding for holding in needs(layout, states) if holding.worker in alive)


def transfers(holdings: Iterable[Holding], layout: Layout, states: Sequence[str]) -> tuple[Transfer, ...]:
    """Returns the transfers after which `layout` holds, in ascending coordinates. `holdings` are those of live workers, all of one step.

    Each destination gets each run it misses once: from a live owner or a gathered copy if possible, then from an owner's copy of the step
    before, then from a replica, then from an older one; among equals, from the worker that sends the fewest elements so far. Raises
    CoverageLost for a lost run.
    """
    offers = _grouped(holdings)
    load: dict[int, int] = defaultdict(int)
    moves: list[Transfer] = []
    for (state, layer), wanted in _grouped(needs(layout, states)).items():
        offered = offers.get((state, layer), [])
        for lack in _joined(_freshest(_runs_by_worker(wanted), offered)):
            if not lack.sources:
                run = f"[{lack.start}, {lack.stop})"
                raise CoverageLost(f"no live worker holds {state!r} of layer {layer}, run {run}, needed by worker {lack.destination}")
            for source, start, stop in _least_loaded(lack, load):
                moves.append(Transfer(source=source, destination=lack.destination, state=state, layer=layer, start=start, stop=stop))
    return tuple(moves)


def _grouped(holdings: Iterable[Holding]) -> dict[tuple[str, int], list[Holding]]:
    groups: dict[tuple[str, int], list[Holding]] = defaultdict(list)
    for holding in holdings:
        groups[holding.state, holding.layer].append(holding)
    return groups


def _runs_by_worker(holdings: Iterable[Holding]) -> dict[int, list[Run]]:
    runs: dict[int, list[Run]] = defaultdict(list)
    for holding in holdings:
        runs[holding.worker].append((holding.start, holding.stop))
    return {worker: sorted(found) for worker, found in runs.items()}


def _freshest(wanted: Mapping[int, Sequence[Run]], offered: Sequence[Holding]) -> Iterator[Lack[int]]:
    """Yields what each worker lacks, with the workers that have the freshest copy of it, ascending."""
    ranks: dict[int, list[Holding]] = defaultdict(list)
    for offer in offered:
        ranks[_PREFERENCE[offer.role]].append(offer)
    fresh = [Senders(_whole_runs(ranks[rank])) for rank in sorted(ranks)]
    had = _runs_by_worker(offered)
    for destination, runs in wanted.items():
        for gap in gaps(runs, had.get(destination, ())):
            yield from _from_first(destination, gap, fresh)


def _whole_runs(offers: Iterable[Holding]) -> list[tuple[int, Run]]:
    """Returns the runs of each worker, ascending workers. A run within a longer one would only cut what others lack into pieces."""
    return [(worker, run) for worker, runs in sorted(_runs_by_worker(offers).items()) for run in joined(runs)]


def _from_first(destination: int, gap: Run, fresh: Sequence[Senders[int]]) -> Iterator[Lack[int]]:
    """Divides a gap between the first senders, and what they do not have between the next ones."""
    if not fresh:
        yield Lack(destination, *gap, ())
        return
    for lack in fresh[0].divided(destination, gap):
        if lack.sources:
            yield lack
        else:
            yield from _from_first(destination, (lack.start, lack.stop), fresh[1:])


def _joined(lacks: Iterable[Lack[int]]) -> Iterator[Lack[int]]:
    """Joins neighbouring runs that have the same workers."""
    last: Lack[int] | None = None
    for lack in lacks:
        if last is not None and (last.destination, last.stop, last.sources) == (lack.destination, lack.start, lack.sources):
            last = replace(last, stop=lack.stop)
            continue
        if last is not None:
            yield last
        last = lack
    if last is not None:
        yield last


def _least_loaded(lack: Lack[int], load: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Yields `(source, start, stop)`: each piece goes to the worker that sends least; neighbouring pieces of one worker are joined."""
    size = PIECE if len(lack.sources) > 1 else lack.stop - lack.start
    started = lack.start
    chosen = None
    least = [(load[worker], worker) for worker in lack.sources]
    heapify(least)
    for start in range(lack.start, lack.stop, size):
        stop = min(start + size, lack.stop)
        _, source = least[0]
        load[source] += stop - start
        heapreplace(least, (load[source], source))
        if chosen is not None and source != chosen:
            yield chosen, started, start
            started = start
        chosen = source
    if chosen is not None:
        yield chosen, started, lack.stop


def minimum_elements(holdings: Iterable[Holding], layout: Layout, states: Sequence[str]) -> int:
    """Returns the fewest elements that any set of transfers can move. An oracle: it shares no code with `needs` and `transfers`."""
    return sum(minimum_by_layer(holdings, layout, states).values())


def minimum_by_layer(holdings: Iterable[Holding], layout: Layout, states: Sequence[str]) -> dict[tuple[str, int], int]:
    """Returns the fewest elements for every `(state, layer)`.

    It goes through the model from boundary to boundary, and counts the workers that need the elements in between and do not have them.
    """
    had: dict[tuple[str, int], list[Holding]] = {(state, layer.layer): [] for layer in layout.layers for state in states}
    for holding in holdings:
        if (holding.state, holding.layer) in had:
            had[holding.state, holding.layer].append(holding)
    totals: dict[tuple[str, int], int] = {}
    for (state, layer), held in had.items():
        edges = {position for holding in held for position in (holding.start, holding.stop)}
        edges |= {position for interval in layout.layers[layer].intervals for position in (interval.start, interval.stop)}
        tied = (run for user in layout.layers for base, *run in layout.model.tied_runs(user.layer) if base == layer)
        edges.update(position for run in tied for position in run)
        totals[state, layer] = 0
        for start, stop in pairwise(sorted(edges)):
            have = {holding.worker for holding in held if holding.start <= start < holding.stop}
            totals[state, layer] += (stop - start) * len(_needers(layout, state, layer, start) - have)
    return totals


def _needers(layout: Layout, state: str, layer: int, position: int) -> set[int]:
    here = layout.layers[layer]
    copies = {worker for i in here.intervals if i.start <= position < i.stop for worker in (i.owner, *i.replicas)}
    spec = layout.model.layers[layer]
    if state != PARAM and spec.frozen:
        return set()
    if state == MASTER and not (layout.model.masters and spec.dtype in ("float16", "bfloat16")):
        return set()
    if state != PARAM:
        return copies
    tied = {
        worker
        for user in layout.layers
        for base, start, stop in layout.model.tied_runs(user.layer)
        for worker in user.members
        if base == layer and start <= position < stop
    }
    return set(here.members) | tied | copies
