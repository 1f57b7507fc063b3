"""Where a job stands on its way from one view to the next: a value, which only `machine.step` makes anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from elastic.control.blame import MicroBatchLoss
from elastic.control.events import AttemptId, Vote

if TYPE_CHECKING:
    from elastic.recovery.inventory import Inventory
    from elastic.recovery.proposal import Proposal
    from elastic.view import Member, View


class Phase(Enum):
    RUNNING = "running"
    BOUNDARY = "boundary"
    QUIESCING = "quiescing"
    PROPOSING = "proposing"
    MIGRATING = "migrating"
    COMMITTING = "committing"
    PAUSED = "paused"
    CLOSING = "closing"  # some have finished and another died: no way to recover, unless the rest finish as well
    ENDED = "ended"


ATTEMPTING = (Phase.QUIESCING, Phase.PROPOSING, Phase.MIGRATING)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPolicy:
    """How many workers the job wants, how few it goes on with, whether replacements are started, and whether it saves checkpoints."""

    workers: int
    min_workers: int = 1
    respawn: bool = True
    checkpoints: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    due: float
    reporters: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """An attempt to be opened by itself: a worker stopped, and no death has explained it."""

    due: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlState:
    """Where the job stands. `attempt` is the last one burned on the way from `view`; `participants` are those of that attempt.

    `starting` workers run but are not ready to be members, `ready` ones are; `newcomers` joined with this view, of which no step is
    committed yet. `fallen`: the next view begins with a checkpoint, since the state is in nobody's memory; `afresh`: or at step 0, with new
    workers only, since nothing was saved yet. `slowdowns` are those that the next plan is made for. `losses` are those of all members so
    far, in order. `damaged` members of the view have given up copies of their state.
    """

    policy: JobPolicy
    view: View
    next_worker: int
    phase: Phase = Phase.RUNNING
    attempt: int = 0
    dead: frozenset[int] = frozenset()
    evicted: frozenset[int] = frozenset()
    finished: frozenset[int] = frozenset()
    starting: frozenset[int] = frozenset()
    ready: Mapping[int, Member] = field(default_factory=dict)
    participants: frozenset[int] = frozenset()
    paused: Mapping[int, int] = field(default_factory=dict)
    inventories: Mapping[int, Inventory] = field(default_factory=dict)
    proposal: Proposal | None = None
    votes: Mapping[int, Vote] = field(default_factory=dict)
    suspects: Mapping[int, Suspicion] = field(default_factory=dict)
    retry: Retry | None = None
    newcomers: frozenset[int] = frozenset()
    losses: tuple[MicroBatchLoss, ...] = ()
    damaged: frozenset[int] = frozenset()
    failed_joins: int = 0
    failed_attempts: int = 0
    stopping: bool = False
    fallen: bool = False
    afresh: bool = False
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    cause: str = ""  # the last death of a member, as a sentence
    start_at: float | None = None
    join_at: float | None = None
    close_at: float | None = None
    nag_at: float | None = None

    @property
    def attempt_id(self) -> AttemptId:
        """Of the attempt under way, else of the view."""
        return (self.view.epoch + 1, self.attempt) if self.attempt else (self.view.epoch, self.view.attempt)

    @property
    def live(self) -> tuple[int, ...]:
        """The members that have not died, in the order of their places."""
        return tuple(worker for worker in self.view.workers if worker not in self.dead)

    @property
    def missing(self) -> tuple[int, ...]:
        """Whose answer the phase waits for."""
        if self.phase is Phase.BOUNDARY:
            return tuple(worker for worker in self.live if worker not in self.paused)
        if self.phase is Phase.QUIESCING:
            return tuple(sorted(self.participants - self.inventories.keys()))
        if self.phase is Phase.MIGRATING and self.proposal is not None:
            return tuple(worker for worker in self.proposal.view.workers if worker not in self.votes)
        return ()

    @property
    def wake_at(self) -> float | None:
        """When a Timeout is due."""
        retry_at = None if self.retry is None else self.retry.due
        dues = [suspicion.due for suspicion in self.suspects.values()]
        times = [self.start_at, self.join_at, self.close_at, self.nag_at, retry_at, *dues]
        return min((time for time in times if time is not None), default=None)
