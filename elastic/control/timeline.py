"""Records the times of one recovery and makes an Incident of them. Times are monotonic seconds and passed in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic.control.events import Vote
from elastic.host.channel import Message
from elastic.observe.finding import Finding
from elastic.observe.incident import Incident

if TYPE_CHECKING:
    from elastic.recovery.proposal import Proposal
    from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPace:
    """The progress of the training when an incident began: `committed` is the last step seen committed, at `at`; a step took `step_s`.

    `begun` is the newest step that a worker had begun and not abandoned by itself, None between two steps.
    """

    committed: int | None = None
    at: float | None = None
    step_s: float | None = None
    begun: int | None = None

    def last_commit(self, now: float) -> float | None:
        """Returns when the last step before `now` was committed, as far as the pace allows to estimate."""
        if self.at is None or not self.step_s or now < self.at:
            return self.at
        return now - (now - self.at) % self.step_s

    def remaining(self, now: float, step: int) -> float:
        """Returns how long after `now` the step would have been committed without the incident."""
        if self.at is None or self.committed is None or not self.step_s:
            return 0.0
        return max(0.0, self.at + (step - self.committed) * self.step_s - now)


@dataclass(slots=True, kw_only=True)
class Timeline:
    """The times and figures of one recovery so far. `kind`, `cause`, `worker`, `step` and `phase` are as in Incident."""

    kind: str
    before: View
    fault: float
    detected: float
    pace: TrainingPace
    worker: int | None = None
    step: int | None = None
    phase: str | None = None
    why: str | None = None
    cause: str | None = None
    samples_per_micro_batch: int = 1
    also: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    _opened: float = 0.0
    _inventoried: float | None = None
    _proposed: float | None = None
    _committed: float | None = None
    _proposal: Proposal | None = None
    _votes: list[tuple[float, Vote]] = field(default_factory=list)
    _view: View | None = None
    _spares: tuple[int, ...] = ()
    _resumed: dict[int, float] = field(default_factory=dict)
    _first: dict[int, Message] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._opened = self.detected

    def lost(self, worker: int, why: str | None = None) -> None:
        """Records the loss of another worker before the recovery is over, with the reason if it is known: the same one is told once.

        A view committed since the first loss no longer counts.
        """
        self.also.append(worker)
        if why not in (self.why or "").split("; "):
            self.why = "; ".join(filter(None, (self.why, why))) or None
        self._view = None
        self._first.clear()
        self._resumed.clear()

    def also_damaged(self, worker: int | None, why: str, findings: Sequence[Finding]) -> None:
        """Records that a member discards copies of its state before the recovery is over, or that copies differ (None)."""
        if self.kind == "damage" and worker is not None and worker != self.worker and worker not in self.also:
            self.also.append(worker)
        self.differ(why, findings)

    def differ(self, why: str, findings: Sequence[Finding]) -> None:
        """Records that state in memory is wrong, or that copies of it differ."""
        self.findings += findings
        self.why = "; ".join(filter(None, (self.why, why)))

    def opened(self, now: float) -> None:
        """Records the beginning of an attempt; the figures are those of the last attempt."""
        if self._inventoried is not None or self._votes:
            self._opened = now
        self._inventoried = self._proposed = self._committed = None
        self._votes.clear()

    def inventoried(self, now: float) -> None:
        self._inventoried = now

    def proposed(self, now: float, proposal: Proposal) -> None:
        self._proposed, self._proposal = now, proposal

    def voted(self, now: float, vote: Vote) -> None:
        self._votes.append((now, vote))

    def committed(self, now: float, view: View, spares: Sequence[int] = ()) -> None:
        """Records the commit of a view; of its new members, these were `spares`."""
        self._committed, self._view, self._spares = now, view, (*self._spares, *spares)

    def resumed(self, worker: int, at: float) -> None:
        self._resumed.setdefault(worker, at)

    def first_commit(self, worker: int, committed: Message) -> None:
        """Records that a member has seen the new view's first step committed: `step`, `at`, and `taken_over_s` as the worker tells it."""
        self._first[worker] = committed

    @property
    def settled(self) -> bool:
        """Whether all members run in the new view, and it has a committed step: a later loss is another incident."""
        return bool(self._first) and self._view is not None and self._resumed.keys() >= set(self._view.workers)

    @property
    def over(self) -> bool:
        """Whether it is settled, and all members have told what they did in the first step."""
        return self.settled and self._view is not None and self._first.keys() >= set(self._view.workers)

    @property
    def _first_at(self) -> float | None:
        return min((committed["at"] for committed in self._first.values()), default=None)

    def incident(self) -> Incident:
        """Returns the incident, as far as it is known."""
        view, proposal = self._view, self._proposal
        votes = [vote for _, vote in self._votes]
        links = {name: sum(vote.links.get(name, 0) for vote in votes) if votes else None for name in ("kept", "dropped", "made")}
        redone = None if proposal is None else steps_redone(proposal, self.pace.begun)
        first_at = self._first_at
        redo = first_at - max(self._resumed.values()) if first_at is not None and self._resumed else None
        return Incident(
            kind=self.kind,
            at=self.fault,
            worker=self.worker,
            cause=self.cause,
            place=self.before.place(self.worker) if self.worker in self.before.workers else None,
            step=self.step,
            phase=self.phase,
            also=tuple(self.also),
            epoch=None if view is None else view.epoch,
            attempts=None if view is None else view.attempt,
            detected_ms=_ms(self.detected - self.fault),
            phases_ms=self._phases(),
            lost_ms=self._lost(redone),
            running_ms=_ms(max(self._resumed.values()) - self.fault) if self._resumed else None,
            redo_ms=None if redo is None else _ms(redo),
            redo_taken_over_ms=_ms(max(told["taken_over_s"] for told in self._first.values())) if redone and self._first else None,
            stall_ms=self._stall(),
            steps_redone=redone,
            restored=None if proposal is None or proposal.restore is None else proposal.restore.name,
            micro_batches_kept=None if proposal is None else kept(proposal),
            samples_lost=None if proposal is None else samples_lost(proposal.view) * self.samples_per_micro_batch,
            bytes_moved=sum(vote.received_bytes + vote.copied_bytes for vote in votes) if votes else None,
            bytes_copied=sum(vote.copied_bytes for vote in votes) if votes else None,
            bytes_minimum=None if proposal is None else proposal.bytes_minimum,
            links_kept=links["kept"],
            links_dropped=links["dropped"],
            links_made=links["made"],
            joined=() if view is None else tuple(worker for worker in view.workers if worker not in self.before.workers),
            layout_before=self.before.plan.summary,
            layout_after=None if view is None else view.plan.summary,
            spares=() if view is None else tuple(worker for worker in self._spares if worker in view.workers),
            why=self.why,
            planned=None if proposal is None else proposal.planned,
            findings=tuple(self.findings),
            went_back_to=None if proposal is None or proposal.back is None else proposal.resume,
        )

    def _phases(self) -> Mapping[str, float]:
        """Returns the milliseconds of each phase, from the end of the one before, as far as the recovery got."""
        moved = max((vote.times["moved"] for _, vote in self._votes if "moved" in vote.times), default=None)
        voted = max((at for at, _ in self._votes), default=None)
        marks = {
            "quiesce": self._inventoried,
            "propose": self._proposed,
            "migrate": moved or voted,
            "gate": voted,
            "commit": self._committed,
        }
        phases: dict[str, float] = {}
        last = self._opened
        for phase, mark in marks.items():
            if mark is None:
                break
            phases[phase] = _ms(mark - last)
            last = mark
        return phases

    def _lost(self, redone: int | None) -> float | None:
        """Returns the milliseconds from the last commit that still counts until the fault."""
        if redone == 0:
            return 0.0
        last = self.pace.last_commit(self.fault)
        if last is None or redone is None:
            return None
        return _ms(self.fault - last + (redone - 1) * (self.pace.step_s or 0.0))

    def _stall(self) -> float | None:
        at = self._first_at
        if at is None:
            return None
        step = next(iter(self._first.values()))["step"]
        return _ms(at - self.fault - self.pace.remaining(self.fault, step))


def steps_redone(proposal: Proposal, begun: int | None) -> int:
    """Returns how many steps after the resumed one a worker had begun, or had returned to the user if only a checkpoint was left."""
    return max(proposal.resume if begun is None else begun, proposal.yielded, proposal.resume) - proposal.resume


def kept(proposal: Proposal) -> int:
    """Returns how many micro-batches of the interrupted step no worker has to compute again."""
    return sum(len(proposal.view.workload.micro_batches_of(grain)) for grain in proposal.finished)


def samples_lost(view: View) -> int:
    """Returns how many micro-batches of a step some stage computes on none of its workers."""
    whole = range(view.workload.micro_batches)
    done = (
        {micro_batch for worker in stage.members for micro_batch in view.plan.micro_batches_of(worker, view.workload)}
        for stage in view.plan.stages
    )
    return max(len(set(whole) - stage) for stage in done)


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
