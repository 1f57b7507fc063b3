"""Decides whether the job is faster without a worker that is extremely slow. Pure: measurements and time go in.

A slower worker gets less to do (`control/balance.py`). This is not enough where it must do something: a stage of its own, or updates. It is
excluded if the plan without it is predicted to be faster than any with it; or if steps, after its work was taken away, still take longer
than predicted without it. Predictions are scaled by how long steps took before, with all workers well. So is one that is stopped in turns,
or held by a quota (`health/turns.py`), whatever its layers take, if steps take twice as long as predicted without it.

A new worker on the same host may be slow again. Then it is given less to do, and not excluded: not for an hour, the next time for two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from elastic.errors import PlanError
from elastic.health.turns import Halts
from elastic.health.verdict import CRAWLING, Verdict
from elastic.plan.fleet import Fleet
from elastic.plan.planner import fastest, step_s
from elastic.view import View

EXTREME = 5.0
"""How many times as long as others a worker must take."""

GAIN = 1.25
"""How many times as fast steps must be predicted to be without it."""

GAIN_OBSERVED = 2.0
"""The same, if what steps take with it is not predicted but observed: other things may slow them too."""

AGAIN_S = 3600.0
"""How long after an exclusion for slowness no other follows on that host; doubles each time."""

_STEPS = 8  # steps of a view before its pace counts
_EVERY_S = 1.0


class Crawling:
    """Judges slow workers of one job that asked for `stages` and may not shrink below `min_workers`."""

    def __init__(self, stages: int | None, min_workers: int) -> None:
        self._stages, self._min_workers = stages, min_workers
        self._scale: float | None = None  # measured over predicted seconds of a step, at best, with all workers well
        self._pace: tuple[int, int, float] = (0, 0, 0.0)  # epoch, its first reported step, seconds of a step; 0.0 if not known yet
        self._excluded: dict[str, tuple[int, float]] = {}  # by host: how often, and when last
        self._next_at = self._next_turns_at = 0.0
        self._predicted: tuple[View, float | None] | None = None  # the view, and the seconds of its step; None if some are slower

    def note(self, view: View, epoch: int, step: int, seconds: float | None) -> None:
        """Records how long steps take now, as a worker reports it."""
        if epoch != view.epoch or not seconds:
            return
        if self._pace[0] != epoch:
            self._pace = epoch, step, 0.0
        if step - self._pace[1] >= _STEPS:
            self._pace = epoch, self._pace[1], seconds
            predicted = self._step_s(view)
            if predicted is not None:
                scale = seconds / predicted
                self._scale = scale if self._scale is None else min(self._scale, scale)

    def _step_s(self, view: View) -> float | None:
        """Returns the predicted seconds of a step of this view, None if its members are not equally fast. Simulates each view once."""
        if self._predicted is None or self._predicted[0] is not view:
            fleet = view.fleet
            self._predicted = view, step_s(view.plan, view.workload, fleet) if fleet.equal else None
        return self._predicted[1]

    def verdict(self, view: View, measured: Mapping[int, float] | None, now: float) -> Verdict | None:
        """Returns the verdict on the slowest member. `measured` are new slowdowns for which the plan is to be changed, None without any.

        Without new ones the answer is None within a second of the last one.
        """
        if measured is None and now < self._next_at:
            return None
        self._next_at = now + _EVERY_S
        slowdowns = view.slowdowns if measured is None else measured
        worker = max(view.workers, key=lambda each: slowdowns.get(each, 1.0))
        factor = slowdowns.get(worker, 1.0) / min(slowdowns.get(each, 1.0) for each in view.workers)
        host = view.fleet.host(worker)
        if factor < EXTREME or len(view.workers) <= max(1, self._min_workers) or not self._may(host, now):
            return None
        found = self._compared(view, slowdowns, worker, planned=measured is None)
        if found is None or found[0] <= (GAIN if measured is not None else GAIN_OBSERVED) * found[1]:
            return None
        self._exclude(host, now)
        steps = f"steps take {found[0]:.2g} s with it, and are predicted to take {found[1]:.2g} s without it"
        why = f"it takes {factor:.2g} times as long as others; {steps}"
        return Verdict(worker=worker, kind=CRAWLING, why=why, for_s=0.0, excludes=True)

    def stopped_in_turns(self, view: View, worst: Halts | None, now: float) -> Verdict | None:
        """Returns the verdict on a worker that is kept from running. At most once a second."""
        if worst is None or now < self._next_turns_at:
            return None
        self._next_turns_at = now + _EVERY_S
        worker, (epoch, _, seconds) = worst.worker, self._pace
        host = view.fleet.host(worker)
        if self._scale is None or epoch != view.epoch or len(view.workers) <= max(1, self._min_workers) or not self._may(host, now):
            return None
        try:
            without = fastest(_without(view.fleet, worker), view.workload, self._fitting(len(view.workers) - 1))
        except PlanError:
            return None
        alone_s = without.step_s * self._scale
        if seconds <= GAIN_OBSERVED * alone_s:
            return None
        self._exclude(host, now)
        steps = f"steps take {seconds:.2g} s with it, and are predicted to take {alone_s:.2g} s without it"
        return Verdict(worker=worker, kind=CRAWLING, why=f"{worst.sentence}; {steps}", for_s=0.0, excludes=True)

    def _exclude(self, host: str, now: float) -> None:
        self._excluded[host] = self._excluded.get(host, (0, 0.0))[0] + 1, now

    def _may(self, host: str, now: float) -> bool:
        times, last = self._excluded.get(host, (0, 0.0))
        return not times or now - last >= AGAIN_S * 2.0 ** (times - 1)

    def _compared(self, view: View, slowdowns: Mapping[int, float], worker: int, *, planned: bool) -> tuple[float, float] | None:
        """Returns the seconds of a step with and without the worker; None if they cannot be told.

        `planned`: the view's plan was made for these slowdowns, so its steps show how long they take with it.
        """
        fleet = replace(view.fleet, slowdowns=slowdowns)
        scale = 1.0 if self._scale is None else self._scale
        try:
            alone = fastest(_without(fleet, worker), view.workload, self._fitting(len(view.workers) - 1)).step_s * scale
            if not planned:
                return fastest(fleet, view.workload, self._fitting(len(view.workers))).step_s * scale, alone
        except PlanError:
            return None
        epoch, _, seconds = self._pace
        return (seconds, alone) if self._scale is not None and epoch == view.epoch and seconds else None

    def _fitting(self, workers: int) -> int | None:
        return None if self._stages is None else min(self._stages, workers)


def _without(fleet: Fleet, worker: int) -> Fleet:
    return replace(
        fleet,
        workers=tuple(each for each in fleet.workers if each != worker),
        slowdowns={each: factor for each, factor in fleet.slowdowns.items() if each != worker},
    )
