"""What some steps of a view took: seconds of a step, each worker's seconds in its layers, joules of its GPU. Pure.

A window begins with the first report after the clocks were set, of a step that began later, and ends when there are enough steps and
seconds. Reports carry sums, so the figures of a window are differences between its last and its first reports.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

STEPS = 6
"""Least number of steps in a window."""

MOST_STEPS = 16
"""Steps after which a window ends, even if its steps are too different to be compared precisely."""

PRECISE = 0.003
"""The standard error of the seconds of a step, as a share, with which windows can be compared: what lower clocks may cost is 0.01."""

SECONDS = 1.0
"""Least seconds of a window: energy counters move every 20 to 100 ms, and workers report every 250 ms."""

SETTLE = 2
"""Steps after a change of clocks that do not count."""


class Report(NamedTuple):
    """A worker's report: it begins `step`; the one before was committed at the monotonic time `at`. Seconds since the view began."""

    step: int
    at: float
    computed_s: float
    expected_s: float
    joules: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFigures:
    """A worker in a window: seconds a step in its layers, as measured and as the workload predicts, and its GPU's joules a step."""

    busy_s: float
    expected_s: float
    joules: float | None

    @property
    def ratio(self) -> float:
        """The measured seconds as a multiple of the predicted ones; 1 if nothing was to be computed."""
        return self.busy_s / self.expected_s if self.expected_s > 0 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A complete window. `times` has the seconds of each step, of some steps their mean."""

    step_s: float
    steps: int
    workers: Mapping[int, WorkerFigures]
    times: tuple[float, ...] = ()

    @property
    def typical(self) -> tuple[float, ...]:
        """The seconds of its steps, to be compared by their median; their mean if they are not known one by one."""
        return self.times or (self.step_s,)

    @property
    def joules(self) -> float | None:
        """Joules of a step, of all GPUs; None if those of any are not known."""
        each = [figures.joules for figures in self.workers.values()]
        return None if not each or None in each else sum(joules for joules in each if joules is not None)

    def watts(self, worker: int, idle_w: float) -> float | None:
        """Returns the mean watts of a worker's GPU while it computed: the rest of a step it took its idle watts."""
        figures = self.workers[worker]
        if figures.joules is None or figures.busy_s <= 0:
            return None
        return (figures.joules - idle_w * max(0.0, self.step_s - figures.busy_s)) / figures.busy_s


class Window:
    """One window of the workers of a view. `precise`: it lasts until its steps can be compared with those of another one."""

    def __init__(self, workers: tuple[int, ...], began_at: float, *, precise: bool = False) -> None:
        self._workers, self._began_at, self._precise = workers, began_at, precise
        self._from: int | None = None  # the first step that counts
        self._first: dict[int, Report] = {}
        self._last: dict[int, Report] = {}
        self._times: dict[int, list[float]] = {worker: [] for worker in workers}

    def note(self, worker: int, report: Report) -> None:
        """Takes a report; those of other workers do not count."""
        if worker not in self._workers or report.at < self._began_at:
            return
        if self._from is None:
            self._from = report.step + SETTLE
        if report.step >= self._from:
            self._first.setdefault(worker, report)
            if (last := self._last.get(worker)) is not None and (steps := report.step - last.step) > 0:
                self._times[worker] += [(report.at - last.at) / steps] * steps
            self._last[worker] = report

    def figures(self) -> Figures | None:
        """Returns the figures once every worker has reported enough; None until then."""
        if len(self._first) < len(self._workers):
            return None
        spans = {worker: (self._first[worker], self._last[worker]) for worker in self._workers}
        if any(last.step - first.step < STEPS or last.at - first.at < SECONDS for first, last in spans.values()):
            return None
        longest = max(spans, key=lambda worker: spans[worker][1].step - spans[worker][0].step)
        first, last = spans[longest]
        if self._precise and last.step - first.step < MOST_STEPS and _error(self._times[longest]) > PRECISE:
            return None
        return Figures(
            step_s=(last.at - first.at) / (last.step - first.step),
            steps=last.step - first.step,
            workers={worker: _figures(first, last) for worker, (first, last) in spans.items()},
            times=tuple(self._times[longest]),
        )


def _error(times: Sequence[float]) -> float:
    """Returns the standard error of the mean, as a share of it."""
    return statistics.stdev(times) / len(times) ** 0.5 / statistics.mean(times)


def ratio_of(times: Sequence[float], before: Sequence[float]) -> float:
    """Returns how many times as long steps take as before: the median of both, which single disturbed steps do not move."""
    return statistics.median(times) / statistics.median(before)


def _figures(first: Report, last: Report) -> WorkerFigures:
    steps = last.step - first.step
    known = first.joules is not None and last.joules is not None
    return WorkerFigures(
        busy_s=(last.computed_s - first.computed_s) / steps,
        expected_s=(last.expected_s - first.expected_s) / steps,
        joules=((last.joules or 0.0) - (first.joules or 0.0)) / steps if known else None,
    )
