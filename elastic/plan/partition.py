"""Divides contiguous layers among ordered stages, and workers among stages: exact, in two steps.

1. Find the least bottleneck M. For a given M, a small recursion over stages and layers gives the fewest workers that keep every stage
   within it. M is one of finitely many values, found by bisection.
2. Among all partitions with that bottleneck, find the least sum over stages, then the least parameters of the largest stage: a dynamic
   programme over (stages left, first layer, workers left), which only visits states that step 1 leaves possible.

Seconds are counted in whole picoseconds, so that equal costs tie exactly, regardless of rounding in sums.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Generator
from dataclasses import replace
from functools import cache
from itertools import accumulate, chain, combinations, pairwise

from elastic.errors import PlanError
from elastic.plan.workload import Workload

Choice = tuple[int, int, tuple[tuple[int, int], ...]]
"""Sum of stage times, parameters of the largest stage, and per stage (first layer of the next stage, workers)."""

StageParts = tuple[tuple[range, int], ...]
"""The layers and the number of workers of each stage."""

_NONE: Choice = (0, 0, ())

_FEW = 4096
"""Number of limits that are listed and sorted at once: about a millisecond."""


def partitioning(workload: Workload, workers: int, stages: int) -> Generator[None, None, StageParts]:
    """Returns the layers and the number of workers of each stage, using all workers. Yields every few milliseconds.

    Minimises the largest over stages of (forward + backward seconds per micro-batch) x ceil(grains / workers of the stage), then the sum of
    these, then the parameters of the largest stage. Raises PlanError if there are more stages than layers or workers, or none.
    """
    return (yield from _Programme(workload, workers, stages).solving())


def both_ways(workload: Workload, workers: int, stages: int) -> Generator[None, None, tuple[StageParts, StageParts]]:
    """Returns the partition of `partitioning`, and the one that it finds from the last layer to the first, equally good by its measures.

    They differ in where stages have many workers. Which schedule is faster, a simulation decides.
    """
    programme = _Programme(workload, workers, stages)
    bottleneck = yield from programme.bottleneck()
    found = yield from programme.solving(bottleneck)
    yield
    layers = len(workload.layers)
    back = yield from _Programme(replace(workload, layers=workload.layers[::-1]), workers, stages).solving(bottleneck)
    return found, tuple((range(layers - run.stop, layers - run.start), count) for run, count in reversed(back))


class _Programme:
    def __init__(self, workload: Workload, workers: int, stages: int) -> None:
        check_feasible(len(workload.layers), workers, stages)
        self.grains, self.workers, self.stages, self.layers = workload.grains, workers, stages, len(workload.layers)
        self.seconds = [0, *accumulate(round((layer.forward_s + layer.backward_s) * 1e12) for layer in workload.layers)]
        self.parameters = [0, *accumulate(layer.parameters for layer in workload.layers)]
        # Only the fewest workers for each number of rounds are considered: more gain nothing.
        most = workers - stages + 1
        fewest = {-(-self.grains // n): n for n in range(most, 0, -1)}
        self.options = [(n, rounds) for rounds, n in sorted(fewest.items(), reverse=True)]

    def solving(self, bottleneck: int | None = None) -> Generator[None, None, StageParts]:
        if bottleneck is None:
            bottleneck = yield from self.bottleneck()
        fewest = yield from self._fewest_workers(bottleneck)
        _, _, steps = self._best(bottleneck, fewest)
        stops = [0, *(stop for stop, _ in steps)]
        runs = [range(start, stop) for start, stop in pairwise(stops)]
        return tuple(zip(runs, self._give_out(runs, [n for _, n in steps]), strict=True))

    def bottleneck(self) -> Generator[None, None, int]:
        """Returns the least limit that the workers can keep: some stage's time in some number of rounds.

        Halves the range of limits until it contains few such products, then searches these.
        """
        times = sorted({self.seconds[stop] - self.seconds[start] for start, stop in combinations(range(self.layers + 1), 2)})
        rounds = [each for _, each in self.options]
        below, limit = -1, times[-1] * max(rounds)  # this limit suffices: one worker per stage, however long that takes
        while _products(times, rounds, below, limit) > _FEW:
            yield
            middle = (below + limit) // 2
            below, limit = (below, middle) if (yield from self._suffices(middle)) else (middle, limit)
        parts = ([time * each for time in times[bisect(times, below // each) : bisect(times, limit // each)]] for each in rounds)
        candidates = sorted(set(chain.from_iterable(parts)))
        low, high = 0, len(candidates) - 1
        while low < high:
            yield
            middle = (low + high) // 2
            low, high = (low, middle) if (yield from self._suffices(candidates[middle])) else (middle + 1, high)
        return candidates[low]

    def _suffices(self, limit: int) -> Generator[None, None, bool]:
        """Returns whether the workers can keep this limit."""
        fewest = yield from self._fewest_workers(limit)
        return fewest[self.stages][0] <= self.workers

    def _fewest_workers(self, limit: int) -> Generator[None, None, list[list[int]]]:
        """Returns [stages left][first layer]: the fewest workers with which no stage exceeds `limit`; workers + 1 if impossible."""
        never = self.workers + 1
        table = [[never] * self.layers + [0]]
        for left in range(1, self.stages + 1):
            later, row = table[-1], [never] * (self.layers + 1)
            for start in range(self.layers - left, -1, -1):
                for stop in range(start + 1, self.layers - left + 2):
                    here = self._workers_for(start, stop, limit)
                    if here >= never:
                        break
                    row[start] = min(row[start], here + later[stop])
            table.append(row)
            yield
        return table

    def _workers_for(self, start: int, stop: int, limit: int) -> int:
        time = self.seconds[stop] - self.seconds[start]
        rounds = limit // time if time else self.grains
        return -(-self.grains // rounds) if rounds else self.workers + 1

    def _best(self, limit: int, fewest: list[list[int]]) -> Choice:
        @cache
        def best(left: int, start: int, workers: int) -> Choice:
            if not left:
                return _NONE
            found: list[Choice] = []
            for stop in range(start + 1, self.layers - left + 2):
                least = self._workers_for(start, stop, limit)
                if least > workers:
                    break
                time, size = self.seconds[stop] - self.seconds[start], self.parameters[stop] - self.parameters[start]
                for n, rounds in self.options:
                    if least <= n <= workers - fewest[left - 1][stop]:
                        total, largest, steps = best(left - 1, stop, workers - n)
                        found.append((time * rounds + total, max(size, largest), ((stop, n), *steps)))
            return min(found)

        return best(self.stages, 0, self.workers)

    def _give_out(self, runs: list[range], given: list[int]) -> list[int]:
        """Adds the workers that speed up nothing to the stages with most parameters per worker."""
        for _ in range(self.workers - sum(given)):
            sizes = [self.parameters[run.stop] - self.parameters[run.start] for run in runs]
            place = max(range(len(runs)), key=lambda stage: sizes[stage] / given[stage])
            given[place] += 1
        return given


def _products(times: list[int], rounds: list[int], below: int, limit: int) -> int:
    """Counts the products, of one of the ascending times and one of the numbers of rounds, in (below, limit]."""
    return sum(bisect(times, limit // each) - bisect(times, below // each) for each in rounds)


def check_feasible(layers: int, workers: int, stages: int) -> None:
    """Raises PlanError, with advice, unless every stage can have a layer and a worker."""
    if stages < 1:
        raise PlanError(f"{stages} stages were asked for: ask for at least one, or leave `stages` out")
    if stages > layers:
        raise PlanError(f"{stages} stages need {stages} layers and the model has {layers}: ask for at most {layers} stages")
    if stages > workers:
        raise PlanError(f"{stages} stages need {stages} workers and there are {workers}: ask for at most {workers} stages, or add workers")
