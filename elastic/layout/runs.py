"""The algebra of runs: a run is `[start, stop)` of a vector, as a pair. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
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
    held = joined(had)
    done = place = 0
    for start, stop in wanted:
        position = max(start, done)
        while place < len(held) and held[place][1] <= position:
            place += 1
        while place < len(held) and held[place][0] < stop:
            first, last = held[place]
            if position < first:
                gaps.append((position, first))
            position = max(position, last)
            if last >= stop:
                break
            place += 1
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
    senders = Senders(offers)
    for destination, runs in needed.items():
        for gap in gaps(runs, had.get(destination, ())):
            yield from senders.divided(destination, gap)


def gaps(runs: Iterable[Run], mine: Sequence[Run]) -> list[Run]:
    """Returns what is missing of `runs`, which are ascending, to a worker that has the runs `mine`, which are too."""
    wanted = [run for run in runs if run not in mine]
    return missing(wanted, mine) if wanted else []


class Senders(Generic[S]):
    """The sources of each run, with their places among the offers: many sources often have the same run."""

    def __init__(self, offers: Sequence[tuple[S, Run]]) -> None:
        found: dict[Run, dict[S, int]] = {}
        for place, (source, run) in enumerate(offers):
            found.setdefault(run, {}).setdefault(source, place)
        self._found = sorted(found.items(), key=lambda item: item[0])
        self._starts = [start for (start, _), _ in self._found]
        self._reach = list(accumulate((stop for (_, stop), _ in self._found), max))  # the largest stop so far: ascending

    def near(self, gap: Run) -> list[tuple[Run, dict[S, int]]]:
        """Returns the runs that share elements with a gap, and their sources."""
        begun = self._found[bisect_right(self._reach, gap[0]) : bisect_left(self._starts, gap[1])]
        return [(run, sources) for run, sources in begun if run[1] > gap[0]]

    def divided(self, destination: int, gap: Run) -> Iterator[Lack[S]]:
        """Yields the parts of a gap of `destination`, cut where the set of possible senders changes."""
        near = self.near(gap)
        if all(first <= gap[0] and gap[1] <= end for (first, end), _ in near):
            yield Lack(destination, *gap, _joined([sources for _, sources in near]))
            return
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
