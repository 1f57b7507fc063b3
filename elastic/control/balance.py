"""Decides whether workers differ in speed so much, and so steadily, that another plan pays. Pure: measurements go in.

A worker's slowdown is the ratio of the measured time of its layers to the time that the workload predicts. The workload can be wrong about
layers, so a worker is compared only with the members of its stage, which have the same layers. A difference counts only if it has the same
sign in each of the last reports, since processors are noisy.

A worker that is alone in its stage is compared with all other workers by two ratios that do not depend on layers: wall-clock time over CPU
time of its layers, and the CPU time of a computation that is the same on all workers. This measure is coarser (a worker with more to do is
also interrupted more), and it causes layers to move. So the ratio must be larger, and each change of the plan doubles the number of reports
that must agree, up to MOST_REPORTS: a wrong verdict is not repeated often.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from elastic.errors import PlanError
from elastic.health.crawling import Crawling
from elastic.health.evidence import Observed
from elastic.health.turns import Turns
from elastic.health.verdict import Verdict
from elastic.host.channel import Message
from elastic.plan.planner import fastest, step_s
from elastic.view import View

REPORTS = 8
"""Number of a worker's last reports that must agree."""

MOST_REPORTS = 64
"""Largest number of reports that must agree for a worker that is alone in its stage, reached after several changes of the plan."""

NOISE = 1.15
"""Ratios up to this count as 1."""

APART = 1.5
"""Ratios up to this count as 1 between workers with different layers."""

GAIN = 1.1
"""Least ratio of the step time to that of the best plan that justifies a change: its cost is then soon repaid."""


_WEIGHED_EVERY_S = 1.0


class Reports:
    """The last slowdowns reported by the members of one view."""

    def __init__(self) -> None:
        self._epoch = 0
        self._changes = 0
        self._of: dict[int, deque[float]] = {}
        self._alone: dict[int, deque[float]] = {}
        self._last: dict[int, tuple[float, float, float]] = {}
        self._enough: set[int] = set()  # the workers that have reported often enough

    def note(self, epoch: int, worker: int, computed_s: float, cpu_s: float, expected_s: float, reference_s: float) -> None:
        """Records one worker's report, the fields of `elastic.engine.layer_times.EffortReport`. Reports of earlier epochs are dropped."""
        if epoch > self._epoch:
            self._epoch, self._of, self._alone, self._last, self._enough = epoch, {}, {}, {}, set()
        if epoch < self._epoch:
            return
        now = computed_s, cpu_s, expected_s
        spent_s, used_s, due_s = (a - b for a, b in zip(now, self._last.get(worker, (0.0, 0.0, 0.0)), strict=True))
        if min(spent_s, used_s, due_s, reference_s) > 0:
            self._last[worker] = now
            self._of.setdefault(worker, deque(maxlen=REPORTS)).append(spent_s / due_s)
            self._alone.setdefault(worker, deque(maxlen=MOST_REPORTS)).append(spent_s / used_s * reference_s)
            if len(self._of[worker]) >= REPORTS:
                self._enough.add(worker)

    def acted(self) -> None:
        """Records that the plan is changed because of these reports."""
        self._changes += 1

    @property
    def patience(self) -> int:
        """Number of reports that must agree for a worker that is alone in its stage."""
        return min(MOST_REPORTS, REPORTS << self._changes)

    def relative(self, view: View) -> dict[int, float] | None:
        """Returns each member's slowdown: the view's, or another if the member's reports differ steadily from the fastest of its stage.

        None until all members have reported enough.
        """
        if view.epoch != self._epoch or not self._enough.issuperset(view.workers):
            return None
        told = {worker: [*self._of[worker]] for worker in view.workers}
        found = dict(view.slowdowns)
        for stage in view.plan.stages:
            found |= _compared(told, view.slowdowns, stage.members, stage.members, NOISE)
        told = {worker: [*self._alone[worker]][-self.patience :] for worker in view.workers}
        if all(len(reports) == self.patience for reports in told.values()):
            alone = [stage.members[0] for stage in view.plan.stages if len(stage.members) == 1]
            found |= _compared(told, view.slowdowns, view.workers, alone, APART)
        return found


def _compared(
    told: Mapping[int, Sequence[float]], known: Mapping[int, float], among: Iterable[int], judged: Iterable[int], noise: float
) -> dict[int, float]:
    """Returns the slowdowns of the workers in `judged` that differ from `known`.

    The unit is the time of the fastest class in `among`: the workers with the least known slowdown.
    """
    usual = {worker: statistics.median(told[worker]) for worker in among}
    least = min(known[worker] for worker in usual)
    unit = statistics.median_low(usual[worker] for worker in usual if known[worker] == least) / least
    found: dict[int, float] = {}
    for worker in judged:
        if _differs(told[worker], known[worker] * unit, noise):
            found[worker] = round(usual[worker] / unit, 2) if _differs(told[worker], least * unit, noise) else least
    return found


def _differs(reports: Sequence[float], expected: float, noise: float) -> bool:
    return min(reports) > noise * expected or max(reports) < expected / noise


def wanted(view: View, measured: Mapping[int, float], stages: int | None) -> bool:
    """Whether the best plan for these slowdowns is faster than the view's by GAIN."""
    if all(max(measured[worker], known) <= NOISE * min(measured[worker], known) for worker, known in view.slowdowns.items()):
        return False
    fleet = replace(view.fleet, slowdowns=measured)
    try:
        best = fastest(fleet, view.workload, None if stages is None else min(stages, len(view.workers)))
    except PlanError:
        return False
    return step_s(view.plan, view.workload, fleet) > GAIN * best.step_s


class Weighing:
    """Decides when to ask for another plan, from the reports of a view's members. Checks at most once a second."""

    def __init__(self, stages: int | None) -> None:
        self._stages, self._reports, self._next_at = stages, Reports(), 0.0

    def note(self, epoch: int, worker: int, effort: Sequence[float]) -> None:
        """Records one worker's report: the fields of `elastic.engine.layer_times.EffortReport`."""
        self._reports.note(epoch, worker, *effort)

    def weigh(self, view: View, now: float) -> dict[int, float] | None:
        """Returns the slowdowns that justify another plan; None if the plan stays."""
        if now < self._next_at:
            return None
        measured = self._reports.relative(view)
        if measured is None:
            return None
        self._next_at = now + _WEIGHED_EVERY_S
        if not wanted(view, measured, self._stages):
            return None
        self._reports.acted()
        return measured


class Balance:
    """Decides what to do about slow workers: nothing, to shift work to others, or to replace one without which the job is faster."""

    def __init__(self, stages: int | None, min_workers: int) -> None:
        self._weighing, self._crawling, self._turns = Weighing(stages), Crawling(stages, min_workers), Turns()

    def note(self, view: View, worker: int, progress: Message) -> None:
        """Records one worker's report."""
        self._weighing.note(progress["epoch"], worker, progress["effort"])
        self._crawling.note(view, progress["epoch"], progress["step"], progress.get("step_s"))

    def looked(self, view: View, seen: Sequence[Observed]) -> None:
        """Records one look at the members of the view while they train."""
        self._turns.note(view.epoch, view.workers, seen)

    def decide(self, view: View, now: float) -> Verdict | dict[int, float] | None:
        """Returns the verdict on a worker to be replaced, or slowdowns that justify another plan; None if everything stays."""
        slowdowns = self._weighing.weigh(view, now)
        found = self._crawling.verdict(view, slowdowns, now) or self._crawling.stopped_in_turns(view, self._turns.worst(view.epoch), now)
        return found or slowdowns


def sentence(slowdowns: Mapping[int, float]) -> str:
    """Returns a sentence such as `worker 1 takes 3.1 times as long as others`."""
    slow = {worker: factor for worker, factor in sorted(slowdowns.items()) if factor != 1.0}
    if not slow:
        return "all workers are equally fast again"
    return ", ".join(f"worker {worker} takes {factor:.2g} times as long as others" for worker, factor in slow.items())
