"""The algebra of runs: a run is `[start, stop)` of a vector, as a pair. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

Run = tuple[int, int]

S = TypeVar("S")


def shared(one: Run, other: Run) -> Run | None:
    """Returns the run that two runs share, or None."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


def joined(runs: Iterable[Run]) -> list[Run]:
    """Returns the union as ascending runs that do not touch."""
    found: list[Run] = []
    for start, stop in sorted(runs):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def missing(wanted: Iterable[Run], had: Sequence[Run]) -> list[Run]:
    """Returns the union of `wanted` minus the union of `had`, as ascending disjoint runs. Both are sorted; their runs may overlap."""
    gaps: list[Run] = []
    done = 0
    for start, stop in wanted:
        position = max(start, done)
        for first, last in had:
            if position < first < stop:
                gaps.append((position, first))
            if first < stop:
                position = max(position, last)
        if position < stop:
            gaps.append((position, stop))
        done = max(done, stop)
    return gaps


@dataclass(frozen=True, slots=True)
class Lack(Generic[S]):
    """`destination` needs the run `[start, stop)` and has none of it; each of `sources` has all of it. No sources: the run is lost."""

    destination: int
    start: int
    stop: int
    sources: tuple[S, ...]


def lacking(needed: Mapping[int, Sequence[Run]], had: Mapping[int, Sequence[Run]], offers: Sequence[tuple[S, Run]]) -> Iterator[Lack[S]]:
    """Yields the runs of one vector that each worker needs and does not have, cut where the set of possible senders changes.

    `needed` and `had` map workers to ascending runs. `offers` lists which source has which run; a source is any key that identifies a
    sender, not only a worker's number. `Lack.sources` is in the order of the offers.
    """
    senders = _by_run(offers)
    for destination, runs in needed.items():
        mine = had.get(destination, ())
        for gap in missing([run for run in runs if run not in mine], mine):
            yield from _divided(destination, gap, senders)


def _by_run(offers: Sequence[tuple[S, Run]]) -> dict[Run, dict[S, int]]:
    """Returns the sources of each run, with their places among the offers: many sources often have the same run."""
    found: dict[Run, dict[S, int]] = {}
    for place, (source, run) in enumerate(offers):
        found.setdefault(run, {}).setdefault(source, place)
    return found


def _divided(destination: int, gap: Run, senders: Mapping[Run, Mapping[S, int]]) -> Iterator[Lack[S]]:
    near = [(run, sources) for run, sources in senders.items() if run[0] < gap[1] and run[1] > gap[0]]
    edges = {*gap, *(edge for run, _ in near for edge in run if gap[0] < edge < gap[1])}
    last: Lack[S] | None = None
    for start, stop in pairwise(sorted(edges)):
        sources = _joined([sources for (first, end), sources in near if first <= start and stop <= end])
        if last is not None and last.sources == sources:
            last = replace(last, stop=stop)
            continue
        if last is not None:
            yield last
        last = Lack(destination, start, stop, sources)
    if last is not None:
        yield last


def _joined(found: Sequence[Mapping[S, int]]) -> tuple[S, ...]:
    """Returns all sources, in the order of the offers."""
    if len(found) == 1:
        return tuple(found[0])
    places: dict[S, int] = {}
    for sources in found:
        for source, place in sources.items():
            places[source] = min(place, places.get(source, place))
    return tuple(sorted(places, key=places.__getitem__))
