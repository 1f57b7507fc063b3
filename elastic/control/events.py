"""Events that a job's state machine handles, and actions that it asks for: values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.control.input_blame import MicroBatchLoss
    from elastic.recovery.inventory import Inventory
    from elastic.recovery.proposal import Proposal
    from elastic.view import Member, View

AttemptId = tuple[int, int]
"""Epoch and attempt: ordered, and never used twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A worker's answer to a proposal. `refusal` is None if its gate passed; `failed_peer` is a worker that it could not reach.

    `unreadable`: it could not read the checkpoint from which all workers were to begin.

    `times` are monotonic seconds: state `installed`, all `moved`, contents `checked`. `links` counts links kept, dropped and made.
    """

    worker: int
    refusal: str | None = None
    failed_peer: int | None = None
    unreadable: bool = False
    received_bytes: int = 0
    copied_bytes: int = 0
    links: dict[str, int] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.refusal is None and self.failed_peer is None

    @classmethod
    def from_json(cls, worker: int, message: dict[str, Any]) -> Vote:
        """Reads a vote from the worker's message; type, epoch and attempt of the message are left out."""
        names = ("refusal", "failed_peer", "unreadable", "received_bytes", "copied_bytes", "links", "times")
        return cls(worker=worker, **{name: message[name] for name in names if message.get(name) is not None})


# Events


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDied:
    """A worker's process ended before it finished. `how` is a sentence; `loss` is what a member was doing, None for a non-member.

    `more`: the death of another member, whose host is lost too, is the next event; an attempt is opened after the last one.
    """

    worker: int
    how: str
    loss: MicroBatchLoss | None = None
    more: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LostLink:
    """Report that `reporter` cannot go on: it lost `peer` or rejects data received from it; `peer` is None if the cause is unknown.

    `damaged`: the reporter discards copies that it holds, since their memory has changed. `unreadable`: the reporter is a founder that
    could not read the checkpoint; only the checkpoint is at fault.
    """

    reporter: int
    peer: int | None
    epoch: int
    reason: str = ""
    damaged: bool = False
    unreadable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventoried:
    worker: int
    attempt_id: AttemptId
    inventory: Inventory


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinerReady:
    worker: int
    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class PausedAt:
    worker: int
    epoch: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed:
    attempt_id: AttemptId
    proposal: Proposal


@dataclass(frozen=True, slots=True, kw_only=True)
class Unproposable:
    """No proposal is possible from these inventories: `kind` names the error class. `back`: only state up to this step may be right.

    `elsewhere`: dead workers have left state in the memory of hosts without a member: new workers there could fetch it. `returning`: hosts
    are silent that may come back with state in their memory. `unbegun`: no step has been applied, so new workers have what is lost.
    """

    attempt_id: AttemptId
    kind: str
    message: str
    back: int | None = None
    unbegun: bool = False
    elsewhere: bool = False
    returning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    attempt_id: AttemptId
    vote: Vote


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFailed:
    """etcd refused a write of the attempt, and does not hold the attempt's view."""

    attempt_id: AttemptId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstCommit:
    worker: int
    epoch: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFinished:
    """The worker's train function has returned."""

    worker: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unbalanced:
    """Another plan pays, since the members have these slowdowns."""

    slowdowns: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unresponsive:
    """The evidence says that a worker fails without announcing it: it is stopped, or hung, or slows the others down extremely."""

    worker: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Hosts have come or gone, or the user scales the job: so many workers and spares are wanted; `rooms` is the room for members by
    host, empty if there is one host."""

    workers: int
    spares: int = 0
    rooms: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unable:
    """These ready workers cannot join now, since they are stopped or silent; all others can."""

    workers: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining:
    """These workers are to leave at the next boundary, since `why`; the others take over what they own."""

    workers: frozenset[int]
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reopened:
    """Another agent has begun to coordinate the job, or a host has come back with the memory of members that are lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """The user asked the job to stop at the next step boundary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """A timer event; `ControlState.wake_at` is when it is due."""


Event = (
    WorkerDied
    | LostLink
    | Inventoried
    | JoinerReady
    | PausedAt
    | Proposed
    | Unproposable
    | Voted
    | Committed
    | CommitFailed
    | FirstCommit
    | WorkerFinished
    | Unbalanced
    | Unresponsive
    | Room
    | Unable
    | Draining
    | Reopened
    | Stopping
    | Timeout
)


# Actions


@dataclass(frozen=True, slots=True, kw_only=True)
class AskBoundary:
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiesce:
    """Open the attempt `attempt_id`: burn its number, and ask each of these workers for its inventory.

    With `restore`, also for the newest checkpoint that it sees. `damaged` are the workers among them that have discarded copies.
    """

    attempt_id: AttemptId
    workers: tuple[int, ...]
    restore: bool = False
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Compute the next view of these members; answered by Proposed or Unproposable. `brief`: more workers will join soon.

    With `restore` all members begin with the newest checkpoint, which must not be of a later step than `back`; with `afresh` at step 0,
    since nothing was saved yet. The workers `leaving`, which have sent inventories too, are no members, and send what they own.
    """

    attempt_id: AttemptId
    view: View
    inventories: dict[int, Inventory]
    joiners: dict[int, Member]
    brief: bool = False
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    restore: bool = False
    afresh: bool = False
    back: int | None = None
    leaving: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Publish the proposal, and ask its members to migrate to it and vote."""

    attempt_id: AttemptId
    proposal: Proposal


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Commit the proposal's view, for which every member has voted. Answered by Committed or CommitFailed, once and surely."""

    attempt_id: AttemptId
    proposal: Proposal
    votes: dict[int, Vote]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """The view is committed. `spares` are those that have joined with it."""

    view: View
    spares: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    worker: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Respawn:
    """Start workers with these new numbers."""

    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndJob:
    """Ends the job. `closing`: some workers have returned from train_fn, and the others cannot go on without one that is lost."""

    kind: str
    message: str
    closing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    sentence: str


ControlAction = AskBoundary | Quiesce | Propose | Offer | Commit | Announce | Evict | Respawn | EndJob | Tell
