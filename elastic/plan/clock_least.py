"""The clocks of least energy with which a step takes a given time at most: all combinations if they are few, else an integer programme.

With a fixed order of actions the seconds of a step are those of its longest path, and a path is linear in the stretches of the stages. So

    least  sum over stages of joules(clock) + idle watts x T    such that  T >= seconds of each path,  T <= limit

is linear in one 0-1 variable for each stage and clock. Paths are many, but few matter: the programme is solved with some, the longest
path of its solution is added, and so on until there is none that was not known. Then no clocks need less energy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from elastic.plan.step_order import Path

MOST_WORK = 30_000_000
"""Up to so many combinations times actions are all computed: some tenths of a second."""

_MOST_PATHS = 200
_GAP = 1e-3
"""By how much the joules may be above the least ones, as a share."""

_SLACK = 1e-9

Places = tuple[int, ...]
"""The clock of each stage, as a place in its options."""


class Speeds(Protocol):
    """The seconds of a step whose stages take longer or shorter."""

    @property
    def actions(self) -> int: ...

    def steps_s(self, stretches: Sequence[Sequence[float]]) -> Sequence[float]: ...

    def longest(self, stretches: Sequence[float]) -> Path: ...


class LeastEnergy:
    """Finds clocks.

    For each stage: how many times as long its work takes at each of its clocks, fastest first, and the joules above those of idle GPUs.
    """

    def __init__(self, speeds: Speeds, stretches: Sequence[Sequence[float]], joules: Sequence[Sequence[float]], idle_w: float) -> None:
        self._speeds, self._stretches, self._joules, self._idle_w = speeds, stretches, joules, idle_w
        self.most_work = MOST_WORK
        self._paths: list[Path] = []
        self._all: tuple[list[Places], np.ndarray, np.ndarray] | None = None

    @property
    def few(self) -> bool:
        """Whether all combinations can be computed."""
        return math.prod(map(len, self._stretches)) * self._speeds.actions <= self.most_work

    def everything(self) -> tuple[list[Places], np.ndarray, np.ndarray]:
        """Returns all combinations, with their seconds and joules."""
        if self._all is None:
            places = list(itertools.product(*(range(len(each)) for each in self._stretches)))
            self._all = (places, *self._judged(places))
        return self._all

    def _judged(self, places: Sequence[Places]) -> tuple[np.ndarray, np.ndarray]:
        index = np.array(places)
        stretches = np.stack([np.array(each)[index[:, stage]] for stage, each in enumerate(self._stretches)], axis=1)
        seconds = np.array(self._speeds.steps_s(stretches))  # pyright: ignore[reportArgumentType]
        busy = sum(np.array(each)[index[:, stage]] for stage, each in enumerate(self._joules))
        return seconds, busy + self._idle_w * seconds

    def within(self, limit_s: float) -> Places | None:
        """Returns the clocks of least energy of a step that takes `limit_s` at most; None if there are none."""
        if not self.few:
            return self._by_paths(limit_s)
        places, seconds, joules = self.everything()
        allowed = np.where(seconds <= limit_s * (1 + _SLACK), joules, np.inf)
        best = int(allowed.argmin())
        return None if math.isinf(allowed[best]) else places[best]

    # Beyond all combinations

    def _by_paths(self, limit_s: float) -> Places | None:
        fastest = tuple(int(np.argmin(each)) for each in self._stretches)
        if self._speeds.steps_s([self._at(fastest)])[0] > limit_s * (1 + _SLACK):
            return None
        self._paths = self._paths or [self._speeds.longest(self._at(fastest))]
        best, best_j, tightened_s = fastest, float(self._judged([fastest])[1][0]), limit_s
        for _ in range(_MOST_PATHS):
            solved = self._solved(tightened_s, best_j)
            if solved is None:
                break
            places, least_j = solved
            for each in {places, self._faster(places, limit_s)}:
                seconds, joules = self._judged([each])
                if seconds[0] <= limit_s * (1 + _SLACK) and joules[0] < best_j:
                    best, best_j = each, float(joules[0])
            if best_j <= least_j * (1 + _GAP):
                break
            path = self._speeds.longest(self._at(places))
            if path not in self._paths:
                self._paths.append(path)
            elif (over_s := self._judged([places])[0][0] - limit_s) > 0:
                tightened_s -= 2 * over_s  # the solver's tolerance lets it miss the limit by a little
            else:
                break
        return best

    def _work_of(self, path: Path) -> Iterator[float]:
        """Yields the seconds of the path at each clock of each stage."""
        for busy_s, stretches in zip(path.busy_s, self._stretches, strict=True):
            yield from (busy_s * each for each in stretches)

    def _at(self, places: Places) -> list[float]:
        return [each[place] for each, place in zip(self._stretches, places, strict=True)]

    def _faster(self, places: Places, limit_s: float) -> Places:
        """Raises clocks one after the other, each time the one that saves most time for its energy, until the step is short enough."""
        while True:
            seconds, joules = self._judged([places])
            if seconds[0] <= limit_s * (1 + _SLACK):
                return places
            raised = [(*places[:at], place - 1, *places[at + 1 :]) for at, place in enumerate(places) if place]
            if not raised:
                return places
            after_s, after_j = self._judged(raised)
            gains = (seconds[0] - after_s) / np.maximum(after_j - joules[0], 1e-12)
            places = raised[int(gains.argmax())]

    def _solved(self, limit_s: float, joules: float) -> tuple[Places, float] | None:
        """Solves the programme with the paths that are known. Returns the clocks, and joules below which no clocks can be.

        Its units are the limit and the given joules: so the solver's tolerances fit.
        """
        from scipy import optimize, sparse  # a fifth of a second, and every worker imports this module

        sizes = [len(each) for each in self._stretches]
        costs = np.array([*itertools.chain(*self._joules), self._idle_w * limit_s]) / joules
        ones = sparse.block_diag([np.ones((1, size)) for size in sizes])
        one_each = sparse.hstack([ones, np.zeros((len(sizes), 1))])
        rows = [[*(seconds / limit_s for seconds in self._work_of(path)), -1.0] for path in self._paths]
        found = optimize.milp(
            costs,
            integrality=np.array([1] * sum(sizes) + [0]),
            bounds=optimize.Bounds(0, 1.0),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(np.array(rows), -np.inf, [-path.fixed_s / limit_s for path in self._paths]),  # pyright: ignore
            ],
            options={"mip_rel_gap": _GAP / 4, "time_limit": 2.0},
        )
        if found.x is None:
            return None
        chosen = np.split(found.x[:-1], np.cumsum(sizes)[:-1])
        return tuple(int(each.argmax()) for each in chosen), float(found.mip_dual_bound) * joules
