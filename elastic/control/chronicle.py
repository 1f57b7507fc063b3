"""What becomes of the members of a job: one incident at a time is timed, and recorded once the job goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from elastic.agent.supervision import Worker
from elastic.control.timeline import Pace, Timeline
from elastic.control.world import World
from elastic.observe import activity, incident
from elastic.observe.activity import Doing
from elastic.view import View


class Chronicle:
    """Of one job. `incidents` are the recorded ones, as JSON; a micro-batch has `samples_per_micro_batch` samples."""

    def __init__(self, world: World, samples_per_micro_batch: int) -> None:
        self.incidents: list[dict[str, Any]] = []
        self._world, self._samples = world, samples_per_micro_batch
        self._timeline: Timeline | None = None
        self._missed_at: dict[tuple[int, int], float] = {}

    @property
    def current(self) -> Timeline | None:
        """Of the incident that is not over yet."""
        return self._timeline

    def doing(self, worker: Worker) -> Doing | None:
        """What the worker did last, as far as it left word of it in this job."""
        doing = activity.read(self._world.directory.path, worker.number)
        return doing if doing is not None and doing.pid == worker.pid and doing.epoch else None

    def missed(self, epoch: int, worker: int, at: float) -> None:
        """Somebody has lost this worker at that time, which is when it died if it is dead."""
        self._missed_at = {key: known for key, known in self._missed_at.items() if key[0] >= epoch}
        self._missed_at.setdefault((epoch, worker), at)

    def lost(self, view: View, worker: Worker, now: float) -> None:
        """A member of `view` has ended: an incident begins, or becomes one of several workers. It ended when it was first missed."""
        fault = min(now, self._missed_at.get((view.epoch, worker.number), now))
        if self._timeline is not None and self._timeline.kind != "join":
            self._timeline.lost(worker.number)
            return
        if self._timeline is not None and self._timeline.before.epoch < view.epoch:  # they have joined; this is another matter
            self._conclude(self._timeline)
        kind, doing = "eviction" if worker.condemned else "death", self.doing(worker)
        step, phase = (worker.step, None) if doing is None else (doing.step, doing.phase)
        self._begin(view, kind, fault, now, worker=worker.number, step=step, phase=phase, why=worker.condemned or None)

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

    def _pace(self, view: View) -> Pace:
        """From the member that told last. `committed` of a progress message is the step committed at `committed_at`."""
        members = [self._world.crew.workers[number] for number in view.workers]
        told = [worker.progress for worker in members if worker.progress.get("epoch") == view.epoch and "committed_at" in worker.progress]
        last = max(told, key=lambda progress: progress["committed_at"] or 0.0, default={})
        doings = [self.doing(worker) for worker in members]
        begun = [doing.step for doing in doings if doing is not None and doing.phase in activity.STEP_PHASES and doing.epoch == view.epoch]
        return Pace(
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
