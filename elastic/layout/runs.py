"""The algebra of runs: a run is `[start, stop)` of a vector, as a pair. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, TypeVar

Run = tuple[int, int]

S = TypeVar("S")


def shared(one: Run, other: Run) -> Run | None:
    """What two runs have in common, None if nothing."""
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


def joined(runs: Iterable[Run]) -> list[Run]:
    """The union, as ascending runs that do not touch."""
    found: list[Run] = []
    for start, stop in sorted(runs):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found


def missing(wanted: Iterable[Run], had: Sequence[Run]) -> list[Run]:
    """The union of `wanted` without the union of `had`, as ascending disjoint runs; both are sorted and may overlap within themselves."""
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
    """`destination` needs the run `[start, stop)` and has none of it; each of `sources` has all of it. Nobody has it if there are none."""

    destination: int
    start: int
    stop: int
    sources: tuple[S, ...]


def lacking(needed: Mapping[int, Sequence[Run]], had: Mapping[int, Sequence[Run]], offers: Sequence[tuple[S, Run]]) -> Iterator[Lack[S]]:
    """What each worker needs of one vector and does not have, cut where the sources change: who can send what to whom.

    `needed` and `had` are by worker, ascending. `offers` says what each source has; sources are whatever tells them apart, and may be more
    than a worker's number. They are listed in the order of the offers.
    """
    for destination, runs in needed.items():
        mine = had.get(destination, ())
        for gap in missing([run for run in runs if run not in mine], mine):
            yield from _divided(destination, gap, offers)


def _divided(destination: int, gap: Run, offers: Sequence[tuple[S, Run]]) -> Iterator[Lack[S]]:
    near = [(source, start, stop) for source, (start, stop) in offers if start < gap[1] and stop > gap[0]]
    edges = {gap[0], gap[1], *(edge for _, *run in near for edge in run if gap[0] < edge < gap[1])}
    last: Lack[S] | None = None
    for start, stop in pairwise(sorted(edges)):
        sources = tuple(dict.fromkeys(source for source, first, end in near if first <= start and stop <= end))
        if last is not None and last.sources == sources:
            last = replace(last, stop=stop)
            continue
        if last is not None:
            yield last
        last = Lack(destination, start, stop, sources)
    if last is not None:
        yield last
