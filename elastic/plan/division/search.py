"""Chooses the micro-batch size and the number of replicas; each choice is one table.

All micro-batches of a step go through `replicas` equal pipelines. For each number of micro-batches per pipeline only the least number of
replicas is considered: more replicas would use more devices and synchronise more, without a gain. Tables are first compared by the step
time that `reach` cannot exclude; the most promising one is searched exactly, and its result excludes most of the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from elastic.errors import PlanError
from elastic.plan.division.compile import Compiler
from elastic.plan.division.cuts import best_cuts
from elastic.plan.division.division import Division, Section
from elastic.plan.division.explain import why_nothing_fits
from elastic.plan.division.mixing import mixtures
from elastic.plan.division.reach import Reach, estimate
from elastic.plan.division.rules import PoolCosts
from elastic.plan.division.shapes import Makeup, alike
from elastic.plan.division.tables import StageCut, step_seconds

SHARES = (0.8, 0.85, 0.9, 0.95)
"""Tables are ordered by the largest share of the best known step time that they cannot reach; the most promising are searched first."""

WIDER = (1.03, 1.1, 1.3)
"""Factors on the estimated step time up to which a step is searched for; a narrow bound excludes most of the search."""

CLOSE = 1.02
"""Factor by which another table must be more promising than the most promising one so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchLimits:
    """Limits of the search: these micro-batch sizes (None: any), at most `most_stages` stages, and stages of two shapes if `mixed`."""

    sizes: tuple[int, ...] | None = None
    most_stages: int = 1 << 30
    mixed: bool = False


class Case(NamedTuple):
    """A micro-batch size, a number of replicas, and the micro-batches of each replica in a step."""

    size: int
    replicas: int
    micro_batches: int


class BestDivision(NamedTuple):
    """The best partition so far."""

    step_s: float
    case: Case
    makeups: Sequence[Makeup]
    cuts: tuple[StageCut, ...]


def divide(rules: PoolCosts, batch: int, limits: SearchLimits = SearchLimits()) -> Division:
    """Returns the plan with the least step time for a global batch of `batch` samples, under the cost model `rules`.

    Every stage has equally many replicas, all of one shape, except for at most one stage of two shapes (`mixing`); layers are contiguous.
    Within that space the result is optimal if it is marked `exact`. Raises PlanError, naming the place, if nothing fits into memory.
    """
    if batch < 1:
        raise PlanError(f"a global batch of {batch} samples cannot be trained: it must be at least 1")
    return _ClusterSearch(rules, batch, limits).run()


class _ClusterSearch:
    def __init__(self, rules: PoolCosts, batch: int, limits: SearchLimits) -> None:
        self.rules, self.batch, self.limits = rules, batch, limits
        self.compiler = Compiler(rules)
        self.exact = True
        self.found: BestDivision | None = None

    @property
    def bound_s(self) -> float:
        return math.inf if self.found is None else self.found.step_s

    def run(self) -> Division:
        cases = list(self._cases())
        alone = {case: reach for case in cases if (reach := self._reach(case, self._alike(case))) is not None}
        self._improve(alone, {case: self._alike(case) for case in alone})
        if self.limits.mixed:
            self._improve_mixed(cases)
        if self.found is None:
            raise PlanError(why_nothing_fits(self.rules, self._sizes()))
        return self._plan(self.found)

    def _sizes(self) -> tuple[int, ...]:
        sizes = self.rules.micro_batch_sizes()
        return sizes if self.limits.sizes is None else tuple(size for size in sizes if size in self.limits.sizes)

    def _cases(self) -> Iterator[Case]:
        for size in self._sizes():
            least = {pool: min(tp for p, tp in self.rules.shapes(size) if p == pool) for pool, _ in self.rules.shapes(size)}
            most = sum(self.rules.pools[pool].count // tp for pool, tp in least.items())
            before = None
            for replicas in range(1, min(most, self.batch) + 1):
                micro_batches = math.ceil(self.batch / (size * replicas))
                if micro_batches != before:
                    yield Case(size, replicas, micro_batches)
                before = micro_batches

    def _alike(self, case: Case) -> list[Makeup]:
        shapes = self.rules.shapes(case.size)
        return [alike(shape, case.replicas) for shape in shapes if shape.tp * case.replicas <= self.rules.pools[shape.pool].count]

    def _reach(self, case: Case, makeups: Sequence[Makeup], mixing: int = 0) -> Reach | None:
        """Makes the tables of a case and their relaxation. A unit is `replicas` devices of a pool; the last resource: mixed stages."""
        if not makeups:
            return None
        pools = [(number, pool.count) for number, pool in enumerate(self.rules.pools)]
        available = np.array([count // case.replicas for _, count in pools] + [mixing])
        units = np.array([[_units(makeup, number, count) for number, count in pools] + [len(makeup.parts) > 1] for makeup in makeups])
        tables = self.compiler.tables(case.size, case.micro_batches, makeups, units, available)
        return Reach(tables, self.limits.most_stages)

    def _improve_mixed(self, cases: Sequence[Case]) -> None:
        makeups = {case: self._alike(case) + mixtures(self.rules, case.size, case.replicas) for case in cases}
        reaches: dict[Case, Reach] = {}
        for case, options in makeups.items():
            if len(options) > len(self._alike(case)) and (reach := self._reach(case, options, mixing=1)) is not None:
                reaches[case] = reach
        self._improve(reaches, makeups)

    def _improve(self, reaches: dict[Case, Reach], makeups: dict[Case, list[Makeup]]) -> None:
        """Searches the tables that may contain a better partition, the most promising first."""
        waiting = dict(reaches)
        if self.found is None and (first := _most_promising(waiting)) is not None:
            self._solve(first[0], waiting.pop(first[0]), makeups[first[0]], first[1])
        shares = [share * self.bound_s for share in SHARES]
        near = {case: reach for case, reach in waiting.items() if reach.within(self.bound_s)}
        places = {case: reach.first_within(shares) for case, reach in near.items()}
        for case in sorted(places, key=lambda case: places[case]):
            if near[case].within(self.bound_s):
                estimate_s = shares[places[case]] if places[case] < len(shares) else self.bound_s
                self._solve(case, near[case], makeups[case], estimate_s)

    def _solve(self, case: Case, reach: Reach, makeups: Sequence[Makeup], estimate_s: float) -> None:
        bounds = [estimate_s * factor for factor in WIDER if estimate_s * factor < self.bound_s]
        for bound_s in [*bounds, self.bound_s]:
            cuts, exact = best_cuts(reach, bound_s)
            self.exact &= exact
            if cuts is not None:
                self.found = BestDivision(step_seconds(reach.tables, cuts), case, makeups, cuts)
                return

    def _plan(self, found: BestDivision) -> Division:
        stages = tuple(Section(layers=range(start, stop), makeup=found.makeups[makeup]) for start, stop, makeup in found.cuts)
        return Division(
            micro_batch=found.case.size, micro_batches=found.case.micro_batches, stages=stages, step_s=found.step_s, exact=self.exact
        )


def _most_promising(reaches: dict[Case, Reach]) -> tuple[Case, float] | None:
    best: tuple[Case, float] | None = None
    for case, reach in sorted(reaches.items(), key=lambda item: item[1].least_step_s):
        if reach.within(math.inf if best is None else best[1] / CLOSE):
            best = case, estimate(reach, math.inf if best is None else best[1])
    return best


def _units(makeup: Makeup, pool: int, count: int) -> int:
    """Returns how many fewer times all replicas can each get a device of the pool, once the stage has taken its devices."""
    return count // makeup.replicas - (count - makeup.devices(pool)) // makeup.replicas
