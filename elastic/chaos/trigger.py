"""Decides when a fault is due, purely, from the observed activity of its victim. Time is passed in."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from elastic.chaos.faults import Fault
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES, Doing

FAR_S = 0.005
_NEAR_S = 0.0005
_RECENT = 15
_ORDER = {phase: place for place, phase in enumerate(RECOVERY_PHASES)}
_BEFORE_ALL, _AFTER_ALL = -1, len(RECOVERY_PHASES)


@dataclass(slots=True)
class StepPace:
    """The duration of steps, from the observed activity of one worker."""

    _times: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _last: Doing | None = None

    def see(self, doing: Doing) -> None:
        """Records the duration of a step that has passed. A step that a recovery interrupted does not count."""
        last = self._last
        if doing.phase not in STEP_PHASES:
            self._last = None
        elif last is None or doing.epoch != last.epoch or doing.step < last.step:
            self._last = doing
        elif doing.step > last.step:
            self._times.append((doing.at - last.at) / (doing.step - last.step))
            self._last = doing

    @property
    def step_s(self) -> float:
        """Median seconds of a step; 0 until a step has passed."""
        return statistics.median(self._times) if self._times else 0.0


@dataclass(slots=True, kw_only=True)
class Trigger:
    """Decides when `fault` is due.

    `fraction`, from 0 to 1, places a fault without a phase within its step. `struck` is the epoch in which the previous fault hit, None if
    there was none. `mid_recovery`: the previous fault hit a recovery, so this one is for a later view, or for that recovery. `reached` is
    the newest step in which any worker was seen.
    """

    fault: Fault
    fraction: float
    struck: int | None = None
    mid_recovery: bool = False
    reached: int = -1
    _since: int | None = None  # the epoch that the recovery to be hit leaves
    _began: float | None = None
    _phase: int = _BEFORE_ALL

    def __post_init__(self) -> None:
        if self.reached >= self.fault.step:
            self._since = self.struck
        if self.mid_recovery:
            self._phase = _AFTER_ALL  # the phases seen so far belong to the previous fault; only the next attempt's can be skipped

    def due(self, doing: Doing, epoch: int, now: float, step_s: float) -> bool:
        """Whether to inject the fault now, given the activity of the victim, a member of view `epoch`, and the seconds of a step."""
        self.reached = max(self.reached, doing.step)
        if self.fault.in_recovery:
            return self.reached >= self.fault.step and self._due_in_recovery(doing, epoch)
        return self._stepping(doing, epoch) and self._due_in_step(doing, now, step_s)

    def _stepping(self, doing: Doing, epoch: int) -> bool:
        """Whether the victim takes steps in this view, and the view is newer than the one that the previous fault hit."""
        newer = self.struck is None or epoch > self.struck
        return newer and doing.epoch == epoch and doing.phase in STEP_PHASES

    def _due_in_step(self, doing: Doing, now: float, step_s: float) -> bool:
        if doing.step != self.fault.step:
            return doing.step > self.fault.step
        if self.fault.phase is not None:
            return doing.phase == self.fault.phase
        if self._began is None:
            self._began = doing.at
        return now >= self._began + self.fraction * step_s

    def _due_in_recovery(self, doing: Doing, epoch: int) -> bool:
        wanted = _ORDER[self.fault.phase or ""]
        if self._since is None:
            self._since = epoch
        if doing.phase not in _ORDER:
            self._phase = _BEFORE_ALL
            return epoch > self._since and self._stepping(doing, epoch)
        before, self._phase = self._phase, _ORDER[doing.phase]
        return self._phase == wanted or before < wanted < self._phase

    def passed(self, doing: Doing, epoch: int) -> bool:
        """Whether it is too late for a fault whose place is not in the view, given the activity of some member of view `epoch`."""
        return self._stepping(doing, epoch) and doing.step > self.fault.step

    @property
    def pause_s(self) -> float:
        """Seconds until the next look at the victim."""
        return _NEAR_S if self.reached >= self.fault.step - 1 else FAR_S
