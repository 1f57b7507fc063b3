"""What is done about the clocks of a view: measure, choose, set, measure again, and undo what does not keep its promise. Pure.

    a view whose GPUs have no models    the usual clocks, then some others, one window each -> models -> the choice
    a view whose plan has clocks        these at once, since their models are known
    after the first                     one window; if the promise is not met, one with the usual clocks and a second one with the chosen,
                                        since the machine itself may have become slower; then, for "energy" and steps that became longer,
                                        another choice that counts with this; else the usual clocks, for this view
    after the second                    one window; a second one if a worker is slower than its model; then the usual clocks

Time and reports are passed in; `Orders` come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from elastic.errors import PlanError, PowerError
from elastic.plan.clock_change import Clocking, clocks_for, delay_shown
from elastic.plan.clock_search import ClockSearch
from elastic.plan.clocks import ClockChoices, Clocked, ClockPlan, ClockPoint, JobSteps, Mode
from elastic.plan.fleet import Fleet
from elastic.power.conditions import locked_by_somebody
from elastic.power.frequency_model import LEAST_CLOCKS, Measurement, fit
from elastic.power.gpu_facts import GpuFacts
from elastic.power.nvml import LOOKS, ClockLook, SupportedClocks
from elastic.power.promise import LONGER, SLOWER, Promise
from elastic.power.windows import Figures, Report, Window
from elastic.view import View

TRIES = 4
"""How many choices of clocks are tried in a view at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """Clocks to set by worker (None: the usual one), and a sentence for the user."""

    clocks: Mapping[int, int | None] = field(default_factory=dict)
    say: str | None = None


class Cycle:
    """The clocks of one job. `mode` None: they are only measured."""

    def __init__(self, mode: Mode | None) -> None:
        self.mode: Mode | None = mode
        self.view: View | None = None
        self.facts: dict[int, GpuFacts] = {}  # by worker
        self.choices: dict[str, ClockChoices] = {}  # by GPU, once there is a model
        self.confidence: dict[str, str] = {}
        self.ratios: dict[str, float] = {}  # measured over predicted seconds at the usual clock, by GPU
        self.figures: Figures | None = None  # of the last window
        self.before: Figures | None = None  # with the usual clocks, in this view
        self.plan: ClockPlan | None = None
        self.state = "waiting"
        self.clocks: dict[int, int | None] = {}
        self._window: Window | None = None
        self._swept: dict[str, list[Measurement]] = {}
        self._sweep: list[dict[int, int | None]] | None = None  # clocks to be measured; None: the usual ones come first
        self._seen: dict[int, list[ClockLook]] = {}  # at computing GPUs that this job has not locked, by worker
        self.message_s = 0.0  # the delay of messages that longer steps have shown
        self._promise: Promise | None = None
        self._again = False
        self._earlier: tuple[float, ...] = ()  # seconds of steps with the chosen clocks before the usual ones were measured again
        self._tried = 0  # choices of this view

    # What happens

    def committed(self, view: View, now: float) -> Orders:
        """Handles a committed view."""
        self.view, self.before, self.plan, self._promise, self._tried = view, None, None, None, 0
        if view.plan.clocks and self.mode is not None:
            clocks = {worker: clock for stage, clock in zip(view.plan.stages, view.plan.clocks, strict=True) for worker in stage.members}
            return self._set("checking", clocks, now)
        return self._begun(now)

    def known(self, worker: int, facts: GpuFacts, now: float) -> Orders:
        """Handles a worker whose GPU is known now."""
        self.facts[worker] = facts
        if self.state == "waiting":
            return self._begun(now)
        return Orders(clocks={worker: self.clocks[worker]}) if self.clocks.get(worker) is not None else Orders()

    def forget(self, worker: int) -> None:
        """Handles the end of a worker's process."""
        self.facts.pop(worker, None)
        self.clocks.pop(worker, None)

    def obeyed(self, now: float) -> None:
        """Handles that the clocks of the last orders are in force: what was measured before does not count."""
        if self._window is not None and self.view is not None:
            self._window = self._next_window(now)

    def stopped(self, why: str | None) -> Orders:
        """Handles that no clock can be set (any more): from now on they are only measured."""
        self.mode, self.state, self.clocks = None, "measuring", {}
        self._window = None if self.view is None else Window(self.view.workers, 0.0)
        return Orders(say=why)

    def throttled(self, worker: int, mhz: int, now: float) -> None:
        """Notes that a GPU does not sustain more than `mhz`: higher clocks are not chosen for it."""
        facts = self.facts[worker]
        kept = SupportedClocks(facts.clocks.memory, tuple(each for each in facts.clocks.graphics if each <= mhz))
        if kept.graphics:
            self.facts[worker] = replace(facts, clocks=kept, usual_mhz=min(facts.usual_mhz, max(kept.graphics)))

    @property
    def looks(self) -> bool:
        """Whether `saw` is to be called: which clock is the usual one shows only while a GPU computes."""
        return self.state == "sweeping" and self._sweep is None

    def saw(self, worker: int, look: ClockLook) -> None:
        """Notes the clock of a GPU that this job has not locked."""
        if "idle" not in look.reasons:
            self._seen.setdefault(worker, []).append(look)

    def noted(self, worker: int, report: Report, now: float) -> Orders:
        """Handles a report."""
        if self._window is None or self.view is None:
            return Orders()
        self._window.note(worker, report)
        figures = self._window.figures()
        if figures is None:
            return Orders()
        self.figures, self._window = figures, self._next_window(now)
        handler = {"sweeping": self._measured, "checking": self._checked, "comparing": self._compared}.get(self.state)
        return Orders() if handler is None else handler(figures, now)

    # The steps of it

    def _begun(self, now: float) -> Orders:
        view = self.view
        if view is None or any(worker not in self.facts for worker in view.workers):
            self.state, self._window = "waiting", None
            return Orders()
        usual: dict[int, int | None] = dict.fromkeys(view.workers)
        if self.mode is None:
            return self._set("measuring", usual, now)
        if all(self.facts[worker].uuid in self.choices for worker in view.workers):
            return self._set("held", usual, now)  # the plan has no clocks: none gains anything
        ours = [self.facts[worker] for worker in view.workers]
        few = [facts.uuid for facts in ours if len(facts.swept) < LEAST_CLOCKS]
        if few:
            self.mode = None
            orders = self._set("measuring", usual, now)
            return replace(orders, say=f"no clock is changed: GPU {few[0]} supports fewer than {LEAST_CLOCKS} clocks that differ enough")
        self._swept, self._seen, self._sweep = {facts.uuid: [] for facts in ours}, {}, None
        return self._set("sweeping", usual, now)

    def _planned_sweep(self, workers: Sequence[int]) -> list[dict[int, int | None]]:
        """Returns the clocks to measure. Those that were seen are the usual ones: many GPUs run above their application clock."""
        for worker in workers:
            if seen := sorted(look.mhz for look in self._seen.get(worker, [])):
                facts = self.facts[worker]
                self.facts[worker] = replace(facts, usual_mhz=facts.nearest(seen[len(seen) // 2]))
        longest = max(len(self.facts[worker].swept) for worker in workers)
        return [{worker: _place(self.facts[worker].swept, place) for worker in workers} for place in range(1, longest)]

    def _locked_by_somebody(self) -> PowerError | None:
        """Returns the error for a GPU that had the clock of a lock whenever it was seen to compute: this job has set none so far."""
        for worker, seen in self._seen.items():
            telling = [look for look in seen if look.tells]
            if len(telling) >= LOOKS and all(look.limited for look in telling):
                return locked_by_somebody(self.facts[worker].uuid, max(look.mhz for look in telling))
        return None

    def _set(self, state: str, clocks: dict[int, int | None], now: float) -> Orders:
        self.state, self.clocks = state, clocks
        self._window = self._next_window(now)
        self._again = False
        return Orders(clocks=clocks)

    def _next_window(self, now: float) -> Window | None:
        """Begins a window; one whose step time is compared with another's is precise."""
        compared = self.state in ("checking", "comparing") or (self.state == "sweeping" and self._sweep is None)
        return None if self.view is None else Window(self.view.workers, now, precise=compared)

    def _measured(self, figures: Figures, now: float) -> Orders:
        """Takes a window of the sweep, and sets the next clocks or makes the choice."""
        if self._sweep is None:
            if (error := self._locked_by_somebody()) is not None:
                return self.stopped(f"no clock is changed: {error}")
            self._sweep = self._planned_sweep(list(self.clocks))
        for worker, clock in self.clocks.items():
            facts = self.facts[worker]
            watts = figures.watts(worker, facts.idle_w)
            if clock is None:
                self.ratios[facts.uuid] = figures.workers[worker].ratio
            at = facts.usual_mhz if clock is None else min(clock, max(facts.clocks.graphics))
            self._swept[facts.uuid].append(Measurement(at, figures.workers[worker].ratio, float("nan") if watts is None else watts))
        self.before = self.before or figures
        if self._sweep:
            return self._set("sweeping", self._sweep.pop(0), now)
        for worker in self.clocks:
            self._model(self.facts[worker])
        return self._choose(now)

    def _model(self, facts: GpuFacts) -> None:
        found = fit(self._swept[facts.uuid])
        self.confidence[facts.uuid] = found.why
        model = found.model
        if model is None or not model.covers(facts.usual_mhz):
            return
        points = tuple(
            ClockPoint(mhz, model.stretch(mhz, facts.usual_mhz), model.watts_at(mhz)) for mhz in facts.clocks.graphics if model.covers(mhz)
        )
        self.choices[facts.uuid] = ClockChoices(points=points, usual=facts.usual_mhz, idle_w=facts.idle_w)

    def _choose(self, now: float) -> Orders:
        """Chooses clocks by the models."""
        plan = self._planned()
        if plan.changes:
            return self._try(plan, now)
        self.plan = plan
        poor = [why for uuid, why in self.confidence.items() if uuid not in self.choices]
        orders = self._set("held", dict.fromkeys(self.clocks), now)
        return replace(orders, say=plan.why + (f" ({poor[0]})" if poor else ""))

    def _planned(self) -> ClockPlan:
        view = self.view
        assert view is not None
        assert self.mode is not None
        return clocks_for(view.plan, self.fleet(view), view.workload, self.clocking(self.mode))

    def _try(self, plan: ClockPlan, now: float) -> Orders:
        """Sets the clocks of a plan, and promises what it predicts."""
        view, before = self.view, self.before
        assert view is not None
        assert before is not None
        self.plan, self._tried = plan, self._tried + 1
        saved = (plan.usual.joules - plan.chosen.joules) / (before.joules or plan.usual.joules)  # GPUs without a model are measured too
        gain = 1 - plan.chosen.step_s / plan.usual.step_s if plan.mode == "speed" else saved
        self._promise = Promise(mode=plan.mode, usual=before, gain=gain)
        return replace(self._set("checking", _by_worker(view, plan.chosen), now), say=plan.why)

    def _checked(self, figures: Figures, now: float) -> Orders:
        """Compares a window with what was promised."""
        promise = self._promise
        broken = self._slow(figures) if promise is None else promise.broken(figures, LONGER)
        if broken is not None and promise is not None and self._again:
            both = replace(figures, times=(*self._earlier, *figures.typical))  # a machine that slowly becomes slower is so for the second
            figures, broken = (both, None) if promise.broken(both, LONGER) is None else (figures, broken)
        if broken is None:
            return self._held(figures)
        if not self._again and promise is None:
            self._again = True  # one window may be disturbed
            return Orders()
        if not self._again:
            self._earlier = figures.typical
            return self._set("comparing", dict.fromkeys(self.clocks), now)
        if promise is not None and self.mode == "energy" and promise.longer(figures) > LONGER:
            return self._tightened(promise, figures, now)
        return self._undone(broken, now)

    def _compared(self, figures: Figures, now: float) -> Orders:
        """Takes another window with the usual clocks, and sets the chosen ones again."""
        assert self.view is not None
        assert self.plan is not None
        assert self._promise is not None
        self.before, self._promise = figures, replace(self._promise, usual=figures)
        orders = self._set("checking", _by_worker(self.view, self.plan.chosen), now)
        self._again = True
        return orders

    def _tightened(self, promise: Promise, figures: Figures, now: float) -> Orders:
        """Learns from steps that are longer than promised, and chooses other clocks with that; keeps these if there are none."""
        view, last = self.view, self.plan
        assert view is not None
        assert last is not None
        shown_s = delay_shown(view.plan, self.fleet(view), view.workload, self.clocking("energy"), last.chosen, promise.longer(figures))
        self.message_s = max(self.message_s, shown_s)
        plan = self._planned()
        if plan.changes and plan.chosen.clocks != last.chosen.clocks and self._tried < TRIES:
            orders = self._try(plan, now)
            return replace(orders, say=f"steps became {100 * promise.longer(figures):.1f} % longer; {orders.say}")
        broken = promise.broken(figures, SLOWER)
        return self._held(figures) if broken is None and plan.changes else self._undone(broken or plan.why, now)

    def _held(self, figures: Figures) -> Orders:
        self.state = "held"
        return Orders(say=None if self._promise is None else self._promise.kept(figures))

    def _undone(self, why: str, now: float) -> Orders:
        orders = self._set("undone", dict.fromkeys(self.clocks), now)
        return replace(orders, say=f"the clocks are as before again: {why}")

    def _slow(self, figures: Figures) -> str | None:
        """Returns which worker is slower than its model says at the clock of the plan; None if none is."""
        for worker, clock in self.clocks.items():
            uuid = self.facts[worker].uuid if worker in self.facts else ""
            choices = self.choices.get(uuid)
            if clock is None or choices is None or clock not in {point.mhz for point in choices.points}:
                continue
            due = self.ratios.get(uuid, 1.0) * choices.at(clock).stretch
            if figures.workers[worker].ratio > due * 1.1:
                times = figures.workers[worker].ratio / due
                return f"worker {worker} takes {times:.2f} times as long at {clock} MHz as the model of its GPU says"
        return None

    # What is known

    def clocking(self, mode: Mode) -> Clocking:
        """Returns the clocks of all workers whose GPU has a model."""
        known = {worker: self.choices.get(facts.uuid) for worker, facts in self.facts.items()}
        found = {worker: choices for worker, choices in known.items() if choices is not None}
        return Clocking(mode=mode, choices=found, message_s=self.message_s)

    def fleet(self, view: View) -> Fleet:
        """Returns the members with their measured speeds at the usual clocks, as multiples of the workload's seconds."""
        ratios = {worker: self.ratios.get(self.facts[worker].uuid, 1.0) for worker in view.workers if worker in self.facts}
        return replace(view.fleet, slowdowns=ratios)

    def stretch(self, worker: int) -> float:
        """Returns how many times as long the worker's work takes because of its present clock, as far as it is known."""
        clock = self.clocks.get(worker)
        choices = self.choices.get(self.facts[worker].uuid) if worker in self.facts else None
        if clock is None or choices is None or clock not in {point.mhz for point in choices.points}:
            return 1.0
        return choices.at(clock).stretch

    def frontier(self) -> Sequence[Clocked]:
        """Returns the frontier of seconds and joules of the present plan; empty if no stage has a model."""
        view = self.view
        if view is None or not self.choices:
            return ()
        clocking = self.clocking("energy")
        choices = [clocking.of(stage) for stage in view.plan.stages]
        if not any(choices):
            return ()
        try:
            steps = JobSteps(view.workload, self.fleet(view), view.plan)
            return ClockSearch(steps.delayed(self.message_s), choices).frontier()
        except PlanError:
            return ()


def _place(clocks: Sequence[int], place: int) -> int:
    return clocks[min(place, len(clocks) - 1)]


def _by_worker(view: View, chosen: Clocked) -> dict[int, int | None]:
    return {worker: clock for stage, clock in zip(view.plan.stages, chosen.clocks, strict=True) for worker in stage.members}
