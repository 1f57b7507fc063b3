"""Times one incident at a time (deaths, evictions, damage, joins, rebalances), and records it once the job goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from elastic.control.carrier import Death
from elastic.control.timeline import Timeline, TrainingPace
from elastic.control.world import World
from elastic.health.verdict import Verdict
from elastic.host.channel import Message
from elastic.observe import activity, incident
from elastic.observe.finding import Finding, parameters_in
from elastic.recovery.resume import Disagreement
from elastic.view import View


class IncidentLog:
    """The incident log of one job. `incidents` are the recorded ones, as JSON, with those that an `earlier` coordinator has recorded; a
    micro-batch has `samples_per_micro_batch` samples."""

    def __init__(self, world: World, samples_per_micro_batch: int, earlier: Iterable[dict[str, Any]] = ()) -> None:
        self.incidents: list[dict[str, Any]] = [*earlier]
        self._world, self._samples = world, samples_per_micro_batch
        self._timeline: Timeline | None = None
        self._progress: dict[int, Message] = {}
        self._missed_at: dict[tuple[int, int], float] = {}
        self.causes: dict[int, str] = {}

    @property
    def current(self) -> Timeline | None:
        """The timeline of the open incident; None if there is none."""
        return self._timeline

    def told(self, worker: int, progress: Message) -> None:
        """Stores a member's newest progress report."""
        self._progress[worker] = progress

    def forget(self, worker: int) -> None:
        """Drops the progress report of a worker that has ended."""
        self._progress.pop(worker, None)

    def missed(self, epoch: int, worker: int, at: float) -> None:
        """Records that a peer lost this worker at time `at`; this is the time of death if the worker turns out to be dead."""
        self._missed_at = {key: known for key, known in self._missed_at.items() if key[0] >= epoch}
        self._missed_at.setdefault((epoch, worker), at)

    def found(self, epoch: int, verdict: Verdict, now: float) -> None:
        """Records what is wrong with a worker that is excluded for it, and since when."""
        self.causes[verdict.worker] = verdict.kind
        self.missed(epoch, verdict.worker, now - verdict.for_s)

    def lost(self, view: View, death: Death, now: float) -> None:
        """Handles the end of a member of `view`: opens an incident, or adds the worker to the open one.

        The time of the fault is when a peer first missed the worker.
        """
        fault = min(now, self._missed_at.get((view.epoch, death.worker), now))
        self._close_settled()
        with_host = f"lost with host {death.lost}" if death.lost else None
        if self._timeline is not None and self._timeline.kind != "join":
            cause = self.causes.get(death.worker, "evicted")
            self._timeline.lost(death.worker, f"worker {death.worker} is {cause}: {death.evicted}" if death.evicted else with_host)
            return
        if self._timeline is not None and self._timeline.before.epoch < view.epoch:  # the join is complete; this death is another incident
            self._conclude(self._timeline)
        kind, doing = "eviction" if death.evicted else "death", death.doing
        if doing is None:  # its host is lost: the others know better than its last report what it was doing
            begun = self._pace(view).begun
            step, phase = death.step if begun is None else begun, None
        else:
            step, phase = doing.step, doing.phase
        cause = self.causes.get(death.worker)
        self._begin(view, kind, fault, now, worker=death.worker, step=step, phase=phase, why=death.evicted or with_host, cause=cause)

    def changes(self, view: View, kind: str, step: int, why: str | None, leaving: Sequence[int] = ()) -> None:
        """Opens an incident for a planned change: the members of `view` pause after `step`, since workers join or leave, or layers move."""
        self._close_settled()
        now = self._world.clock()
        self._begin(view, kind, now, now, step=step, why=why, worker=leaving[0] if leaving else None, also=[*leaving[1:]])

    def damaged(self, view: View, worker: int, message: Message) -> None:
        """Handles the discarding of damaged copies by a member of `view`: opens an incident, or adds this to the open one.

        The member's message has `step`, `reason`, the time `at`, and `findings`.
        """
        why, findings = message["reason"], [Finding.from_json(each) for each in message.get("findings", ())]
        named = worker if not findings or any(each.worker == worker for each in findings) else None  # else it only reports a difference
        self._close_settled()
        current = self._timeline
        if current is not None and current.kind in ("join", "rebalance", "drain") and current.before.epoch < view.epoch:
            self._conclude(current)
        if self._timeline is None:
            more: dict[str, Any] = {"worker": named, "step": message["step"], "why": why, "findings": findings}
            self._begin(view, "damage", message["at"], self._world.clock(), **more)
        else:
            self._timeline.also_damaged(named, why, findings)

    def note(self, act: Callable[[Timeline, float], None]) -> None:
        """Calls `act` with the open incident, if there is one, and the current time; records the incident if it is then over."""
        if self._timeline is not None:
            act(self._timeline, self._world.clock())
            if self._timeline.over:
                self._conclude(self._timeline)

    def close(self) -> None:
        """Records the open incident at the end of the job, as far as it got, even without a committed step."""
        if self._timeline is not None:
            self._conclude(self._timeline)

    def _close_settled(self) -> None:
        """Records the open incident if the job goes on, although some member has not told yet what it did in the first step."""
        if self._timeline is not None and self._timeline.settled:
            self._conclude(self._timeline)

    def _begin(self, view: View, kind: str, fault: float, now: float, **more: Any) -> None:
        pace = self._pace(view)
        self._timeline = Timeline(
            kind=kind, before=view, fault=fault, detected=now, pace=pace, samples_per_micro_batch=self._samples, **more
        )

    def _pace(self, view: View) -> TrainingPace:
        """Returns the training pace, from the latest report. A progress message's `committed` is the step committed at `committed_at`."""
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
        lost = () if found.worker is None or found.kind not in ("death", "eviction") else (found.worker, *found.also)
        found = replace(found, gpus=tuple(each for worker in lost if (each := self._world.gpu(worker)) is not None))
        self.incidents.append(found.to_json())
        self._world.carrier.log(found)
        self._world.incident(found)
        self._world.say(incident.timeline(found))


def conflicting(conflicts: Sequence[Disagreement], view: View, resume: int) -> tuple[str, list[Finding]]:
    """Returns a sentence and the findings of copies whose digests differ in inventories, so that all go back to the step `resume`."""
    hosts = {member.worker: member.host for member in view.members}
    found = []
    for conflict in conflicts:
        layer = view.layout.model.layers[conflict.layer]
        of = {f"{role} worker {worker} (host {hosts.get(worker, 'unknown')})": digest for worker, role, digest in conflict.copies}
        where: dict[str, Any] = {"layer": layer.module, "start": conflict.start, "stop": conflict.stop, "step": conflict.step}
        names = parameters_in(layer.parameters, conflict.start, conflict.stop)
        found.append(Finding(state="state", copy="the", good=resume, parameters=names, digests=of, **where))
    more = f" and of {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"copies of the state differ that must be equal: {found[0]}{more}. Nothing shows which is wrong, so all workers go back to the "
        f"state after step {resume}. The memory of one of these hosts may be faulty",
        found,
    )
