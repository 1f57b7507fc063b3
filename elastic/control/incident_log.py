"""What becomes of the members of a job: one incident at a time is timed, and recorded once the job goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from elastic.control.carrier import Death
from elastic.control.timeline import Timeline, TrainingPace
from elastic.control.world import World
from elastic.host.channel import Message
from elastic.observe import activity, incident
from elastic.view import View


class IncidentLog:
    """Of one job. `incidents` are the recorded ones, as JSON; a micro-batch has `samples_per_micro_batch` samples."""

    def __init__(self, world: World, samples_per_micro_batch: int) -> None:
        self.incidents: list[dict[str, Any]] = []
        self._world, self._samples = world, samples_per_micro_batch
        self._timeline: Timeline | None = None
        self._progress: dict[int, Message] = {}
        self._missed_at: dict[tuple[int, int], float] = {}

    @property
    def current(self) -> Timeline | None:
        """Of the incident that is not over yet."""
        return self._timeline

    def told(self, worker: int, progress: Message) -> None:
        """A member's newest report of its progress."""
        self._progress[worker] = progress

    def forget(self, worker: int) -> None:
        """The worker is gone: what it told says nothing of the others."""
        self._progress.pop(worker, None)

    def missed(self, epoch: int, worker: int, at: float) -> None:
        """Somebody has lost this worker at that time, which is when it died if it is dead."""
        self._missed_at = {key: known for key, known in self._missed_at.items() if key[0] >= epoch}
        self._missed_at.setdefault((epoch, worker), at)

    def lost(self, view: View, death: Death, now: float) -> None:
        """A member of `view` has ended: an incident begins, or becomes one of several workers. It ended when it was first missed."""
        fault = min(now, self._missed_at.get((view.epoch, death.worker), now))
        if self._timeline is not None and self._timeline.kind != "join":
            self._timeline.lost(death.worker)
            return
        if self._timeline is not None and self._timeline.before.epoch < view.epoch:  # they have joined; this is another matter
            self._conclude(self._timeline)
        kind, doing = "eviction" if death.evicted else "death", death.doing
        step, phase = (death.step, None) if doing is None else (doing.step, doing.phase)
        self._begin(view, kind, fault, now, worker=death.worker, step=step, phase=phase, why=death.evicted or None)

    def changes(self, view: View, kind: str, step: int, why: str | None) -> None:
        """The members of `view` pause behind `step`, since others join or layers move."""
        now = self._world.clock()
        self._begin(view, kind, now, now, step=step, why=why)

    def damaged(self, view: View, worker: int, step: int, why: str, fault: float) -> None:
        """A member of `view` gives up copies of its state: an incident, or a part of the one that is under way."""
        current = self._timeline
        if current is not None and current.kind in ("join", "rebalance") and current.before.epoch < view.epoch:
            self._conclude(current)
        if self._timeline is None:
            self._begin(view, "damage", fault, self._world.clock(), worker=worker, step=step, why=why)
        else:
            self._timeline.also_damaged(worker, why)

    def note(self, act: Callable[[Timeline, float], None]) -> None:
        """Has the incident that is not over, if there is one, take note of what happens now; it may be over then."""
        if self._timeline is not None:
            act(self._timeline, self._world.clock())
            if self._timeline.over:
                self._conclude(self._timeline)

    def close(self) -> None:
        """The job is over; an incident that did not get to its first committed step is kept as far as it got."""
        if self._timeline is not None:
            self._conclude(self._timeline)

    def _begin(self, view: View, kind: str, fault: float, now: float, **more: Any) -> None:
        pace = self._pace(view)
        self._timeline = Timeline(
            kind=kind, before=view, fault=fault, detected=now, pace=pace, samples_per_micro_batch=self._samples, **more
        )

    def _pace(self, view: View) -> TrainingPace:
        """From the member that told last. `committed` of a progress message is the step committed at `committed_at`."""
        reports = [self._progress[worker] for worker in view.workers if worker in self._progress]
        told = [progress for progress in reports if progress.get("epoch") == view.epoch and "committed_at" in progress]
        last = max(told, key=lambda progress: progress["committed_at"] or 0.0, default={})
        doings = [seen.doing for seen in self._world.carrier.look(view.workers)]
        begun = [doing.step for doing in doings if doing is not None and doing.phase in activity.STEP_PHASES and doing.epoch == view.epoch]
        return TrainingPace(
            committed=last.get("committed", last["step"] - 2 if last else None),
            at=last.get("committed_at"),
            step_s=last.get("step_s"),
            begun=max(begun, default=None),
        )

    def _conclude(self, timeline: Timeline) -> None:
        self._timeline = None
        found = timeline.incident()
        self.incidents.append(found.to_json())
        with suppress(OSError):  # no room, or the directory is gone: no reason to end a job that runs
            incident.append(self._world.directory.incidents, found)
        self._world.say(incident.timeline(found))
