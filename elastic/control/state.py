"""The state of a job between one view and the next: an immutable value; `machine.step` returns the next one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from elastic.control.events import AttemptId, Vote
from elastic.control.input_blame import MicroBatchLoss

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
    CLOSING = "closing"  # some have finished and another died: the job ends when the rest have had time to finish as well
    ENDED = "ended"


ATTEMPTING = (Phase.QUIESCING, Phase.PROPOSING, Phase.MIGRATING)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPolicy:
    """The wanted number of workers, the least number to go on with, whether replacements are started, whether checkpoints are saved, and
    whether more hosts may join. `spares` are wanted besides the workers. `rooms`: how many members each host has room for, if there are
    several."""

    workers: int
    min_workers: int = 1
    respawn: bool = True
    checkpoints: bool = False
    hosts: bool = False
    spares: int = 0
    rooms: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What a new coordinator knows of the work of the one before: the attempt that was burned last, the next new worker's number, the
    recorded incidents, as JSON, and the `spares`, whose announcements follow."""

    attempt_id: AttemptId
    next_worker: int
    incidents: tuple[dict[str, Any], ...] = ()
    spares: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    due: float
    reporters: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """A pending attempt: a worker stopped, and no death has explained why."""

    due: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """The model does not fit into the memory of `workers` members, nor of fewer; `why` has the bytes."""

    workers: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlState:
    """The state of a job. `attempt` is the number of the last attempt since `view`, `participants` its workers.

    `starting` workers run but are not ready to be members, `ready` ones are; of these, `spares` were ready before they were needed, and
    `unable` ones are stopped or silent. `newcomers` joined with this view and have no committed step yet. `spare_deaths` are the times of
    the last deaths of spares, with the next worker's number then; until `spares_from` no spares are started. `fallen`: the next view begins
    with a checkpoint (of step `back` or before, if copies of later steps differ), since some of the state is in no worker's memory;
    `afresh`: or at step 0, with new workers only, since nothing was saved yet. `slowdowns` are those for which the next plan is made.
    `losses` are those of all members so far, in order. `damaged` members of the view have discarded copies of their state.
    `leaving` workers are drained, with the reason.
    Until `return_at` the attempt waits for hosts that are silent, and may come back with what the others lack; `awaited`: it has waited.
    `reaching`: the next view needs new workers, on hosts where only dead ones have left state in memory.
    `misfit`: the next view needs more members, since no plan for those of an attempt fits into their memory.
    `failed_joins` counts new workers that died before a step was committed with them; those with numbers below `failed_below` are counted.
    After too many none are started until `joins_from`, which has been so `join_pauses` times.
    `last_tries` counts how often new workers were started in spite of that, since all members had died and left their state in memory.
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
    spares: frozenset[int] = frozenset()
    unable: frozenset[int] = frozenset()
    spare_deaths: tuple[tuple[float, int], ...] = ()
    spares_from: float | None = None
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
    joins_from: float | None = None
    join_pauses: int = 0
    last_tries: int = 0
    failed_below: int = 0
    failed_attempts: int = 0
    stopping: bool = False
    leaving: Mapping[int, str] = field(default_factory=dict)
    fallen: bool = False
    back: int | None = None
    afresh: bool = False
    reaching: bool = False
    misfit: Misfit | None = None
    return_at: float | None = None
    awaited: bool = False
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    cause: str = ""  # the last death of a member, as a sentence
    start_at: float | None = None
    join_at: float | None = None
    close_at: float | None = None
    nag_at: float | None = None

    @property
    def attempt_id(self) -> AttemptId:
        """The id of the attempt under way, else that of the view."""
        return (self.view.epoch + 1, self.attempt) if self.attempt else (self.view.epoch, self.view.attempt)

    @property
    def least(self) -> int:
        """The number of members below which the job pauses."""
        return max(self.policy.min_workers, 0 if self.misfit is None else self.misfit.workers + 1)

    @property
    def live(self) -> tuple[int, ...]:
        """The members that have not died, in the order of their places."""
        return tuple(worker for worker in self.view.workers if worker not in self.dead)

    @property
    def missing(self) -> tuple[int, ...]:
        """The workers whose answers the phase waits for."""
        return tuple(self._missing())

    @property
    def waits(self) -> bool:
        """Whether answers are missing; found without a look at all workers, since each answer asks for it."""
        return next(self._missing(), None) is not None

    def lives(self, worker: int) -> bool:
        """Whether a worker is a member that has not died."""
        return worker in self.view.workers and worker not in self.dead

    def _missing(self) -> Iterator[int]:
        if self.phase is Phase.BOUNDARY:
            return (worker for worker in self.view.workers if worker not in self.dead and worker not in self.paused)
        if self.phase is Phase.QUIESCING:
            return (worker for worker in sorted(self.participants) if worker not in self.inventories)
        if self.phase is Phase.MIGRATING and self.proposal is not None:
            return (worker for worker in self.proposal.view.workers if worker not in self.votes)
        return iter(())

    @property
    def wake_at(self) -> float | None:
        """The time at which a Timeout is due; None if none is."""
        retry_at = None if self.retry is None else self.retry.due
        dues = [suspicion.due for suspicion in self.suspects.values()]
        starts = [self.start_at, self.spares_from, self.joins_from]
        times = [*starts, self.join_at, self.close_at, self.nag_at, self.return_at, retry_at, *dues]
        return min((time for time in times if time is not None), default=None)
