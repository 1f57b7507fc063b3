"""Chooses the clocks of a plan's stages: the least energy for a time, and the frontier of both. Pure.

A step takes about (busy seconds of the busiest stage) + (one micro-batch through all others). For this estimate the least energy is exact:
for each possible bottleneck, a merge over the stages keeps the combinations of which no other is both faster and more frugal. The simulated
schedule then judges, and single changes of a clock that it approves of are made as long as they help.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import NamedTuple

from elastic.plan.clocks import ClockChoices, Clocked, ClockPlan, ClockPoint, Mode, Steps, joules

ENERGY_SLACK = 0.0075
"""How much longer a step may take in the mode "energy", as a share."""

SPEED_SHARE = 0.95
"""The share of the possible gain that the mode "speed" takes; the last of it may need all clocks."""

LEAST_GAIN = 0.01
"""Predicted gains below this share are not worth a change."""

MOST_TRIED = 4096
"""Up to so many combinations of clocks are all simulated for the frontier, about a second's work."""

MOST_POINTS = 24
"""Clocks of a stage that are considered, evenly spread: GPUs have up to 130, 15 MHz apart."""

_BEYOND = 0.1
"""Estimates may be so much above the limit, as a share: the simulated step may be shorter, since slower stages sometimes wait less."""

_LIMITS, _JUDGED, _IMPROVED = 16, 6, 3
"""For so many limits of the estimate, so many clocks are simulated; how many of all are improved."""

_COARSE = 256
"""How many combinations of a few clocks are simulated too: the estimate does not know how stages wait for each other."""

_USUAL = ClockPoint(0, 1.0, 0.0)

Points = tuple[ClockPoint, ...]


class _Merged(NamedTuple):
    once_s: float
    joules: float
    points: Points


class _Estimate(NamedTuple):
    step_s: float
    joules: float
    points: Points


@dataclass(frozen=True, slots=True)
class ClockSearch:
    """The clocks of one plan. `choices` has None for stages whose clocks are not known, or are left alone."""

    steps: Steps
    choices: Sequence[ClockChoices | None]
    _merges: dict[tuple[Points, ...], list[_Estimate]] = field(default_factory=dict, init=False, repr=False)

    def clocked(self, points: Sequence[ClockPoint]) -> Clocked:
        """Returns the step with these clocks."""
        step_s = self.steps.step_s([point.stretch for point in points])
        known = [point if choice is not None else None for point, choice in zip(points, self.choices, strict=True)]
        clocks = tuple(
            None if choice is None or point.mhz == choice.usual else point.mhz for point, choice in zip(points, self.choices, strict=True)
        )
        return Clocked(clocks=clocks, step_s=step_s, joules=joules(self.steps.work, self.choices, known, step_s))

    @property
    def usual(self) -> Clocked:
        """The step with the usual clocks."""
        return self.clocked([_USUAL if choice is None else choice.at(choice.usual) for choice in self.choices])

    @property
    def fastest(self) -> Clocked:
        """The step with all clocks as high as they can be sustained."""
        return self.clocked([_USUAL if choice is None else choice.fastest for choice in self.choices])

    def within(self, limit_s: float, options: Sequence[Points] | None = None) -> Clocked | None:
        """Returns the step of least energy that takes `limit_s` at most; None if there is none. `options` restricts the clocks."""
        options = self.options() if options is None else options
        fastest = [min(points) if len(points) == 1 else min(points, key=lambda point: point.stretch) for points in options]
        starts = [fastest, *self._least(options, limit_s * (1 + _BEYOND)), *_coarse(options)]
        judged = [(self.clocked(points), points) for points in starts]
        allowed = sorted((each.joules, place) for place, (each, _) in enumerate(judged) if each.step_s <= limit_s)
        improved = [self._improved(judged[place][1], judged[place][0], limit_s, options) for _, place in allowed[:_IMPROVED]]
        return min(improved, key=lambda each: each.joules, default=None)

    def _improved(self, points: Sequence[ClockPoint], found: Clocked, limit_s: float, options: Sequence[Points]) -> Clocked:
        """Changes one clock, or two against each other, as long as that saves energy within the limit."""
        points = list(points)
        while True:
            tried = [(self.clocked(each), each) for each in _neighbours(points, options)]
            allowed = [(each.joules, place) for place, (each, _) in enumerate(tried) if each.step_s <= limit_s]
            if not allowed or min(allowed)[0] >= found.joules * (1 - 1e-9):
                return found
            found, points = tried[min(allowed)[1]]

    def options(self) -> list[Points]:
        """Returns the clocks that are considered for each stage, fastest first."""
        return [(_USUAL,) if choice is None else _thinned(choice.useful) for choice in self.choices]

    def _least(self, options: Sequence[Points], limit_s: float) -> list[Points]:
        """Returns the clocks of least energy of those whose estimated step takes `limit_s`, or somewhat less, at most."""
        key = tuple(options)
        if key not in self._merges:
            self._merges[key] = sorted(self._merged(options))
        estimates = [each for each in self._merges[key] if each.step_s <= limit_s]
        found: dict[Points, None] = {}
        for number in range(_LIMITS if estimates else 0):
            below_s = estimates[0].step_s + (limit_s - estimates[0].step_s) * (number + 1) / _LIMITS
            within = [each for each in estimates if each.step_s <= below_s * (1 + 1e-12)]
            found.update((each.points, None) for each in nsmallest(_JUDGED, within, key=lambda each: each.joules))
        return list(found)

    def _merged(self, options: Sequence[Points]) -> Iterator[_Estimate]:
        """Yields the combinations that no other beats in one micro-batch's time and in energy, for each time of the busiest stage."""
        work = self.steps.work
        for bound_s in sorted({stage.busiest_s * point.stretch for stage, points in zip(work, options, strict=True) for point in points}):
            fits = [
                tuple(point for point in points if stage.busiest_s * point.stretch <= bound_s * (1 + 1e-12))
                for stage, points in zip(work, options, strict=True)
            ]
            if all(fits):
                yield from (_Estimate(bound_s + each.once_s, each.joules, each.points) for each in self._combined(fits))

    def _combined(self, options: Sequence[Points]) -> list[_Merged]:
        most = max(range(len(options)), key=lambda number: self.steps.work[number].busiest_s)
        partial = [_Merged(0.0, 0.0, ())]
        for number, (stage, choice, points) in enumerate(zip(self.steps.work, self.choices, options, strict=True)):
            idle_w = 0.0 if choice is None else choice.idle_w
            once_s = 0.0 if number == most else stage.once_s
            partial = _frontier(
                _Merged(
                    done.once_s + once_s * point.stretch,
                    done.joules + stage.total_s * point.stretch * (point.watts - idle_w) * (choice is not None),
                    (*done.points, point),
                )
                for done in partial
                for point in points
            )
        return partial

    def frontier(self, points: int = 12) -> tuple[Clocked, ...]:
        """Returns steps from the fastest to the most frugal, `points` at most: none is both slower and less frugal than another."""
        options = self.options()
        frugal = self.clocked([each[-1] for each in options])
        first = self.fastest.step_s
        if math.prod(map(len, options)) <= MOST_TRIED:
            every = [self.clocked(each) for each in itertools.product(*options)]
            return tuple(_best(every, points))
        found: list[Clocked] = []
        for number in range(points):
            limit_s = first + (max(frugal.step_s, first) - first) * number / max(1, points - 1)
            each = self.within(limit_s * (1 + 1e-9), options)
            if each is not None and (not found or each.joules < found[-1].joules * (1 - 1e-6)):
                found.append(each)
        return tuple(found)


def _best(every: Iterable[Clocked], points: int) -> Iterator[Clocked]:
    """Yields the frontier of all steps, thinned to so many points."""
    kept: list[Clocked] = []
    for each in sorted(every, key=lambda one: (one.step_s, one.joules)):
        if not kept or each.joules < kept[-1].joules * (1 - 1e-6):
            kept.append(each)
    count = min(points, len(kept))
    yield from (kept[round(number * (len(kept) - 1) / max(1, count - 1))] for number in range(count))


def _frontier(merged: Iterable[_Merged]) -> list[_Merged]:
    kept: list[_Merged] = []
    for each in sorted(merged, key=lambda one: (one.once_s, one.joules)):
        if not kept or each.joules < kept[-1].joules:
            kept.append(each)
    return kept


def _thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Returns `most` of the points, the first and last among them."""
    if len(points) <= most:
        return points
    return tuple(points[round(number * (len(points) - 1) / (most - 1))] for number in range(most))


def _coarse(options: Sequence[Points]) -> Iterator[tuple[ClockPoint, ...]]:
    """Yields all combinations of a few clocks of each stage, _COARSE at most; none if there are too many stages."""
    most = int(_COARSE ** (1 / max(1, sum(len(points) > 1 for points in options))) + 1e-9)
    if most >= 2:
        yield from itertools.product(*(_thinned(points, most) for points in options))


def _neighbours(points: Sequence[ClockPoint], options: Sequence[Points]) -> Iterator[list[ClockPoint]]:
    """Yields the points with one clock changed to any other, and with one raised and another lowered by up to two places."""
    places = [each.index(point) for each, point in zip(options, points, strict=True)]

    def moved(*moves: tuple[int, int]) -> list[ClockPoint] | None:
        after = dict(enumerate(places))
        for stage, by in moves:
            after[stage] += by
            if not 0 <= after[stage] < len(options[stage]):
                return None
        return [options[stage][place] for stage, place in after.items()]

    count = range(len(points))
    singles = [((stage, place - places[stage]),) for stage in count for place in range(len(options[stage])) if place != places[stage]]
    pairs = [((up, -a), (down, b)) for up in count for down in count if up != down for a in (1, 2) for b in (1, 2)]
    for each in (*singles, *pairs):
        found = moved(*each)
        if found is not None:
            yield found


def choose(mode: Mode, steps: Steps, choices: Sequence[ClockChoices | None], unit: str = " MHz") -> ClockPlan:
    """Returns the clocks of a plan.

    "speed": nearly the fastest step, with every stage between its usual and its highest sustainable clock, and no higher than that needs.
    "energy": the least energy with which a step takes as long as with the usual clocks, or hardly longer.
    Stages keep their usual clocks if the predicted gain is small, or no stage's clocks are known. `unit` is that of clocks in the reason.
    """
    search = ClockSearch(steps, choices)
    usual = search.usual
    if not any(choices):
        return ClockPlan(mode=mode, chosen=usual, usual=usual, why="no clock is changed: none of the stages has a model of time and power")
    if mode == "speed":
        options = [
            (_USUAL,) if choice is None else tuple(point for point in choice.points if point.stretch <= 1.0 + 1e-9) for choice in choices
        ]
        fastest_s = min(search.fastest.step_s, usual.step_s)
        ordered = [tuple(sorted(points, key=lambda point: point.stretch)) for points in options]
        found = search.within(fastest_s + (1 - SPEED_SHARE) * (usual.step_s - fastest_s), ordered) or usual
        gain = 1 - found.step_s / usual.step_s
    else:
        options = [
            tuple(sorted({*points, *_usual_of(choice)}, key=lambda p: p.stretch))
            for points, choice in zip(search.options(), choices, strict=True)
        ]
        found = search.within(usual.step_s * (1 + ENERGY_SLACK), options) or usual
        gain = 1 - found.joules / usual.joules if usual.joules else 0.0
    if gain < LEAST_GAIN:
        return ClockPlan(mode=mode, chosen=usual, usual=usual, why=_no_gain(mode, usual, found))
    return ClockPlan(mode=mode, chosen=found, usual=usual, why=_why(found, usual, choices, unit))


def _usual_of(choice: ClockChoices | None) -> Points:
    return () if choice is None else (choice.at(choice.usual),)


def _no_gain(mode: Mode, usual: Clocked, found: Clocked) -> str:
    if mode == "speed":
        return f"no clock is changed: the fastest clocks give {found.step_s:.3g} s a step, the usual ones {usual.step_s:.3g} s"
    return f"no clock is changed: the best clocks give {found.joules:.4g} J a step, the usual ones {usual.joules:.4g} J"


def _why(found: Clocked, usual: Clocked, choices: Sequence[ClockChoices | None], unit: str) -> str:
    changed = [
        f"stage {number} {'rises' if clock > choice.usual else 'falls'} to {clock}{unit} from {choice.usual}"
        for number, (clock, choice) in enumerate(zip(found.clocks, choices, strict=True))
        if clock is not None and choice is not None
    ]
    before = f"{usual.step_s:.3g} s and {usual.joules:.4g} J"
    return f"{', '.join(changed)}: {found.step_s:.3g} s and {found.joules:.4g} J a step instead of {before}, predicted"
