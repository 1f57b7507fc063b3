"""Time and power of a GPU's work against its clock, fitted to measurements at three clocks or more. Pure.

    T(f) = T (beta fmax / f + 1 - beta)      the share beta of the work depends on the clock, the rest (memory, launches) does not
    P(f) = a + b f / fmax + c (f / fmax)^3   with a, b, c >= 0: leakage, and switching at a voltage that rises with the clock

The confidence of a model is its largest relative error: of its own values at the measured clocks, and of values at a clock between others
that are predicted without its measurement. If that is too large, the model is not trusted, and no clock is changed. It says nothing about
clocks outside the measured range.

A GPU follows these formulas to a few percent only (its highest clocks may be cut by its power limit, its voltage has a floor). So a trusted
model gives at each measured clock what was measured there; between two of them the factor on the formula is on a straight line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

LEAST_CLOCKS = 3

TIME_ERROR = 0.03
"""Largest error of predicted seconds with which a model is trusted."""

POWER_ERROR = 0.10
"""Largest error of predicted watts with which a model is trusted."""

_MOST = 1e9
"""No clock, time or power is larger, and none is smaller than its inverse."""

_BETA_SLACK = 0.05  # noise may carry a beta so far out of [0, 1]

_TERMS = {2: ((0,), (2,), (1,), (0, 2), (0, 1), (1, 2)), 3: ((0,), (2,), (1,), (0, 2), (0, 1), (1, 2), (0, 1, 2))}
"""Sets of terms of the power by their largest number: the constant, the linear and the cubic one."""


class Measurement(NamedTuple):
    """The seconds that a GPU's work of a step took at a clock, and its mean watts while it computed."""

    mhz: float
    seconds: float
    watts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrequencyModel:
    """A fitted model, for clocks from `low_mhz` to `top_mhz`, between which it was measured at `clocks` clocks.

    `seconds` is the fitted time at `top_mhz`; `time_error` and `power_error` are the largest relative errors. `factors` are, by ascending
    clock, how many times as long and as many watts as fitted were measured.
    """

    top_mhz: float
    low_mhz: float
    seconds: float
    beta: float
    watts: tuple[float, float, float]
    clocks: int
    time_error: float
    power_error: float
    factors: tuple[tuple[float, float, float], ...] = ()

    def seconds_at(self, mhz: float) -> float:
        """Returns the seconds of the work at a clock."""
        return self.seconds * (self.beta * self.top_mhz / mhz + 1 - self.beta) * self._factor(mhz, 1)

    def stretch(self, mhz: float, reference_mhz: float) -> float:
        """Returns the time at a clock as a multiple of that at the reference clock."""
        return self.seconds_at(mhz) / self.seconds_at(reference_mhz)

    def watts_at(self, mhz: float) -> float:
        """Returns the watts at a clock while the GPU computes."""
        constant, linear, cubic = self.watts
        share = mhz / self.top_mhz
        return (constant + linear * share + cubic * share**3) * self._factor(mhz, 2)

    def _factor(self, mhz: float, column: int) -> float:
        if not self.factors:
            return 1.0
        return float(np.interp(mhz, [each[0] for each in self.factors], [each[column] for each in self.factors]))

    def covers(self, mhz: float) -> bool:
        """Whether the clock is one that was measured, or between two of them."""
        return self.low_mhz <= mhz <= self.top_mhz

    @property
    def trusted(self) -> bool:
        """Whether clocks may be chosen by this model."""
        return self.time_error <= TIME_ERROR and self.power_error <= POWER_ERROR

    @property
    def confidence(self) -> str:
        """The errors, for people."""
        return (
            f"beta {self.beta:.2f} from {self.clocks} clocks, with errors up to "
            f"{100 * self.time_error:.1f} % of its time and {100 * self.power_error:.1f} % of its power"
        )


@dataclass(frozen=True, slots=True)
class Fit:
    """A model that is trusted, or None and the reason."""

    model: FrequencyModel | None
    why: str


def fit(measurements: Iterable[Measurement]) -> Fit:
    """Fits a model. Measurements of one clock are averaged; those that cannot be true (not positive, not finite, absurd) are left out."""
    points, dropped = _usable(measurements)
    note = f"; {dropped} measurements cannot be true" if dropped else ""
    if len(points) < LEAST_CLOCKS:
        return Fit(None, f"{len(points)} clocks were measured, and a model needs {LEAST_CLOCKS}{note}")
    top = max(point.mhz for point in points)
    seconds, beta = _time(points, top)
    if not -_BETA_SLACK <= beta <= 1 + _BETA_SLACK:
        return Fit(None, f"the times do not follow the clock (beta would be {beta:.2f}){note}")
    model = FrequencyModel(
        top_mhz=top,
        low_mhz=min(point.mhz for point in points),
        seconds=seconds,
        beta=min(1.0, max(0.0, beta)),
        watts=_power(points, top),
        clocks=len(points),
        time_error=_error(points, lambda some: _timed(some, top), lambda point: point.seconds),
        power_error=_error(points, lambda some: _powered(some, top), lambda point: point.watts),
    )
    if not model.trusted:
        return Fit(None, f"the fit is poor: {model.confidence}{note}")
    factors = tuple(
        (each.mhz, each.seconds / model.seconds_at(each.mhz), each.watts / model.watts_at(each.mhz)) for each in reversed(points)
    )
    return Fit(replace(model, factors=factors), model.confidence + note)


def _usable(measurements: Iterable[Measurement]) -> tuple[list[Measurement], int]:
    """Returns one measurement a clock, descending, and how many were left out."""
    by_clock: dict[float, list[Measurement]] = {}
    dropped = 0
    for each in measurements:
        if all(1 / _MOST <= value <= _MOST for value in each):
            by_clock.setdefault(each.mhz, []).append(each)
        else:
            dropped += 1
    means = [Measurement(*(sum(values) / len(values) for values in zip(*group, strict=True))) for group in by_clock.values()]
    return sorted(means, reverse=True), dropped


def _time(points: Sequence[Measurement], top: float) -> tuple[float, float]:
    """Returns the seconds at the clock `top`, and beta: relative least squares of T (1 - beta) + T beta top / f."""
    parts = np.array([[1.0, top / point.mhz] for point in points])
    took = np.array([point.seconds for point in points])
    rest, scaled = np.linalg.lstsq(parts / took[:, None], np.array([1.0] * len(points)), rcond=None)[0]
    return float(rest + scaled), float(scaled / (rest + scaled)) if rest + scaled > 0 else math.inf


def _timed(points: Sequence[Measurement], top: float) -> Callable[[float], float]:
    seconds, beta = _time(points, top)
    return lambda mhz: seconds * (beta * top / mhz + 1 - beta)


def _power(points: Sequence[Measurement], top: float) -> tuple[float, float, float]:
    """Returns the coefficients, none negative: the best of all sets of terms. Three points cannot show more than two terms."""
    shares = [point.mhz / top for point in points]
    parts = np.array([[1.0, share, share**3] for share in shares])
    took = np.array([point.watts for point in points])
    most = 3 if len(points) > LEAST_CLOCKS else 2
    found: tuple[float, tuple[float, float, float]] = (math.inf, (float(took.mean()), 0.0, 0.0))
    for terms in _TERMS[most]:
        some = parts[:, terms] / took[:, None]
        values = np.linalg.lstsq(some, np.array([1.0] * len(points)), rcond=None)[0]
        if (values >= 0).all():
            wrong = float(((some @ values - 1) ** 2).sum())
            whole = {term: float(value) for term, value in zip(terms, values, strict=True)}
            if wrong < found[0] - 1e-12:  # among equals the first is taken
                found = wrong, (whole.get(0, 0.0), whole.get(1, 0.0), whole.get(2, 0.0))
    return found[1]


def _powered(points: Sequence[Measurement], top: float) -> Callable[[float], float]:
    constant, linear, cubic = _power(points, top)
    return lambda mhz: constant + linear * mhz / top + cubic * (mhz / top) ** 3


def _error(
    points: Sequence[Measurement],
    fitted: Callable[[Sequence[Measurement]], Callable[[float], float]],
    of: Callable[[Measurement], float],
) -> float:
    """Returns the largest relative error: of the fit, and of each measurement between others when it is predicted without it."""
    whole = fitted(points)
    predicted = [(whole(point.mhz), of(point)) for point in points]
    for place, point in enumerate(points[1:-1], 1):
        predicted.append((fitted([*points[:place], *points[place + 1 :]])(point.mhz), of(point)))
    return max(abs(value - true) / true for value, true in predicted)
