"""Whether workers differ in speed so much, and so steadily, that another plan pays. Pure: what is measured goes in.

A worker's slowdown is how many times longer its layers take it than the workload says. The workload can be wrong about layers, so only the
ratio to those with the same layers counts, the members of the same stage, and only if it was to one side of theirs in every one of the
last reports: processors are noisy. Of a worker that is alone in its stage nothing can be said.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from elastic.errors import PlanError
from elastic.plan.planner import plan, step_s
from elastic.view import View

REPORTS = 8
"""A worker's, that must agree."""

NOISE = 1.15
"""A ratio that is not told from 1."""

GAIN = 1.1
"""How much longer a step must take than with the best plan: what a change costs is soon paid back then."""


class Reports:
    """The last slowdowns that the members of one view have measured."""

    def __init__(self) -> None:
        self._epoch = 0
        self._of: dict[int, deque[float]] = {}
        self._last: dict[int, tuple[float, float]] = {}

    def note(self, epoch: int, worker: int, computed_s: float, expected_s: float) -> None:
        """One worker's report: what its layers took since the view began, and what the workload says. Earlier epochs are forgotten."""
        if epoch > self._epoch:
            self._epoch, self._of, self._last = epoch, {}, {}
        if epoch < self._epoch:
            return
        before_s, before_expected_s = self._last.get(worker, (0.0, 0.0))
        if expected_s > before_expected_s and computed_s > before_s:
            self._last[worker] = computed_s, expected_s
            slowdown = (computed_s - before_s) / (expected_s - before_expected_s)
            self._of.setdefault(worker, deque(maxlen=REPORTS)).append(slowdown)

    def relative(self, view: View) -> dict[int, float] | None:
        """Each member's slowdown: that of the view, unless its reports steadily say another one beside the fastest of its stage.

        None until all have reported enough.
        """
        told = {worker: [*self._of.get(worker, ())] for worker in view.workers}
        if view.epoch != self._epoch or any(len(reports) < REPORTS for reports in told.values()):
            return None
        usual = {worker: statistics.median(reports) for worker, reports in told.items()}
        known, found = view.slowdowns, dict(view.slowdowns)
        for stage in view.plan.stages:
            least = min(known[worker] for worker in stage.members)
            unit = statistics.median_low(usual[worker] for worker in stage.members if known[worker] == least) / least
            for worker in stage.members:
                if _differs(told[worker], known[worker] * unit):
                    found[worker] = round(usual[worker] / unit, 2) if _differs(told[worker], least * unit) else least
        return found


def _differs(reports: Sequence[float], expected: float) -> bool:
    return min(reports) > NOISE * expected or max(reports) < expected / NOISE


def wanted(view: View, measured: Mapping[int, float], stages: int | None) -> bool:
    """Whether the best plan for these slowdowns is faster than the view's by GAIN."""
    if all(max(measured[worker], known) <= NOISE * min(measured[worker], known) for worker, known in view.slowdowns.items()):
        return False
    try:
        best = plan(view.workers, view.workload, None if stages is None else min(stages, len(view.workers)), measured)
    except PlanError:
        return False
    return step_s(view.plan, view.workload, measured) > GAIN * best.step_s


def sentence(slowdowns: Mapping[int, float]) -> str:
    """Such as `worker 1 takes 3.1 times as long as others`."""
    slow = {worker: factor for worker, factor in sorted(slowdowns.items()) if factor != 1.0}
    if not slow:
        return "all workers are equally fast again"
    return ", ".join(f"worker {worker} takes {factor:.2g} times as long as others" for worker, factor in slow.items())
