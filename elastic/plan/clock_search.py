"""Chooses the clocks of a plan's stages: the least energy for a time, and the frontier of both. Pure; `clock_least` does the search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from elastic.plan.clock_least import LeastEnergy
from elastic.plan.clocks import ClockChoices, Clocked, ClockPlan, ClockPoint, Mode, Steps, joules

ENERGY_SLACK = 0.0075
"""How much longer a step may take in the mode "energy", as a share."""

ENERGY_MARGIN = 0.01
"""By how much less than the busiest stage those are busy whose clocks fall in the mode "energy", as a share of its seconds.

Seconds are irregular: of stages that need the same each micro-batch waits for the one that happens to be slower.
"""

SPEED_SHARE = 0.95
"""The share of the possible gain that the mode "speed" takes; the last of it may need all clocks."""

LEAST_GAIN = 0.01
"""Predicted gains below this share are not worth a change."""

MOST_POINTS = 24
"""Clocks of a stage that are considered, evenly spread: GPUs have up to 130, 15 MHz apart."""

_USUAL = ClockPoint(0, 1.0, 0.0)

Points = tuple[ClockPoint, ...]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ClockSearch:
    """The clocks of one plan. `choices` has None for stages whose clocks are not known, or are left alone."""

    steps: Steps
    choices: Sequence[ClockChoices | None]
    _searches: dict[tuple[Points, ...], LeastEnergy] = field(default_factory=dict, init=False, repr=False)

    def clocked(self, points: Sequence[ClockPoint]) -> Clocked:
        """Returns the step with these clocks."""
        step_s = self.steps.steps_s([[point.stretch for point in points]])[0]
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
        found = self._search(options).within(limit_s)
        return None if found is None else self._at(options, found)

    def _at(self, options: Sequence[Points], places: Sequence[int]) -> Clocked:
        return self.clocked([points[place] for points, place in zip(options, places, strict=True)])

    def options(self) -> list[Points]:
        """Returns the clocks that are considered for each stage, fastest first."""
        return [(_USUAL,) if choice is None else _spread(choice.useful, MOST_POINTS) for choice in self.choices]

    def _search(self, options: Sequence[Points]) -> LeastEnergy:
        key = tuple(options)
        if key not in self._searches:
            busy, idle_w = list[list[float]](), 0.0
            for stage, choice, points in zip(self.steps.work, self.choices, options, strict=True):
                at_rest = 0.0 if choice is None else choice.idle_w
                idle_w += stage.devices * at_rest
                busy.append([stage.total_s * each.stretch * (each.watts - at_rest) * (choice is not None) for each in points])
            self._searches[key] = LeastEnergy(self.steps, [[each.stretch for each in points] for points in options], busy, idle_w)
        return self._searches[key]

    def frontier(self, points: int = 12) -> tuple[Clocked, ...]:
        """Returns steps from the fastest to the most frugal, `points` at most: none is both slower and less frugal than another."""
        options = self.options()
        first, last = self.fastest.step_s, self.clocked([each[-1] for each in options]).step_s
        shares = ((number / max(1, points - 1)) ** 3 for number in range(points))  # close together where steps are fast: there it matters
        limits = [first + (max(last, first) - first) * share for share in shares]
        return tuple(_best(found for limit_s in limits if (found := self.within(limit_s, options)) is not None))


def _best(every: Iterable[Clocked]) -> list[Clocked]:
    """Returns those that no other beats in both."""
    kept: list[Clocked] = []
    for each in sorted(every, key=lambda one: (one.step_s, one.joules)):
        if not kept or each.joules < kept[-1].joules * (1 - 1e-6):
            kept.append(each)
    return kept


def _spread(values: Sequence[T], most: int) -> tuple[T, ...]:
    """Returns `most` of the values, evenly spread, the first and last among them."""
    count = min(most, len(values))
    return tuple(values[round(number * (len(values) - 1) / max(1, count - 1))] for number in range(count))


def choose(mode: Mode, steps: Steps, choices: Sequence[ClockChoices | None], unit: str = " MHz") -> ClockPlan:
    """Returns the clocks of a plan.

    "speed": nearly the fastest step, with every stage between its usual and its highest sustainable clock, and no higher than that needs.
    "energy": the least energy with which a step takes as long as with the usual clocks, or hardly longer, and stages whose clocks fall stay
    faster than the busiest one.
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
        gain = 1 - found.step_s / usual.step_s if usual.step_s else 0.0
    else:
        options = _with_margin(search)
        found = search.within(usual.step_s * (1 + ENERGY_SLACK), options) or usual
        gain = 1 - found.joules / usual.joules if usual.joules else 0.0
    if gain < LEAST_GAIN:
        return ClockPlan(mode=mode, chosen=usual, usual=usual, why=_no_gain(mode, usual, found))
    return ClockPlan(mode=mode, chosen=found, usual=usual, why=_why(found, usual, choices, unit))


def _with_margin(search: ClockSearch) -> list[Points]:
    """Returns the clocks of each stage that leave it the margin, and its usual one, fastest first."""
    most_s = max(stage.busiest_s for stage in search.steps.work) * (1 - ENERGY_MARGIN)
    options = list[Points]()
    for stage, choice, points in zip(search.steps.work, search.choices, search.options(), strict=True):
        usual = set[ClockPoint]() if choice is None else {choice.at(choice.usual)}
        kept = {point for point in points if point.stretch <= 1 or stage.busiest_s * point.stretch <= most_s}
        options.append(tuple(sorted(kept | usual, key=lambda point: point.stretch)))
    return options


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
