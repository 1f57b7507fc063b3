"""What can happen to a job, and what its state machine can ask for: values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic.control.blame import MicroBatchLoss
    from elastic.recovery.inventory import Inventory
    from elastic.recovery.proposal import Proposal
    from elastic.view import Member, View

AttemptId = tuple[int, int]
"""Epoch and attempt: ordered, and never used twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A worker's word on a proposal. `refusal` is None where its gate passed; `failed_peer` is the one it could not reach.

    `unreadable`: it could not read the checkpoint that all were to begin with.

    `times` are monotonic seconds: state `installed`, all `moved`, contents `checked`. `links` counts those kept, dropped and made.
    """

    worker: int
    refusal: str | None = None
    failed_peer: int | None = None
    unreadable: bool = False
    received_bytes: int = 0
    links: dict[str, int] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.refusal is None and self.failed_peer is None

    @classmethod
    def from_json(cls, worker: int, message: dict[str, Any]) -> Vote:
        """From the worker's message; its type, epoch and attempt are left out."""
        names = ("refusal", "failed_peer", "unreadable", "received_bytes", "links", "times")
        return cls(worker=worker, **{name: message[name] for name in names if message.get(name) is not None})


# Events


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDied:
    """A process ended without having finished. `how` is a sentence; `loss` tells what it did, if it was a member."""

    worker: int
    how: str
    loss: MicroBatchLoss | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LostLink:
    """`reporter` cannot go on: it lost `peer`, or refuses what it received from it, or (None) cannot tell whose fault it is.

    `damaged`: it gives up copies of its own, whose memory has changed.
    `unreadable`: it is a founder that could not read the checkpoint, and there is no fault but the checkpoint's.
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
    """There is no way on from these inventories: `kind` names the error class."""

    attempt_id: AttemptId
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Voted:
    attempt_id: AttemptId
    vote: Vote


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitFailed:
    """etcd refused what the attempt wanted to write, and holds another view than its own."""

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
class Stopping:
    """The user asked the job to stop at the next step boundary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """Time has passed; `State.wake_at` says when this is due."""


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
    | Stopping
    | Timeout
)


# Actions


@dataclass(frozen=True, slots=True, kw_only=True)
class AskBoundary:
    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiesce:
    """Opens the attempt `attempt_id`: burns its number, and asks every one of these workers for its inventory.

    With `restore` also for the newest checkpoint that it sees. `damaged` are those of them that have given up copies.
    """

    attempt_id: AttemptId
    workers: tuple[int, ...]
    restore: bool = False
    damaged: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Work out the next view of these members; answered by Proposed or Unproposable. It is `brief` if more workers are to come.

    With `restore` all begin with the newest checkpoint, or `afresh`, where nothing was saved yet.
    """

    attempt_id: AttemptId
    view: View
    inventories: dict[int, Inventory]
    joiners: dict[int, Member]
    brief: bool = False
    slowdowns: Mapping[int, float] = field(default_factory=dict)
    restore: bool = False
    afresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Publish the proposal, and have its members migrate to it and vote."""

    attempt_id: AttemptId
    proposal: Proposal


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Every member has voted for it: make it the view. Answered by Committed or CommitFailed, once and surely."""

    attempt_id: AttemptId
    proposal: Proposal
    votes: dict[int, Vote]


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    worker: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Respawn:
    """Start workers of these new numbers."""

    workers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndJob:
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    sentence: str


ControlAction = AskBoundary | Quiesce | Propose | Offer | Commit | Announce | Evict | Respawn | EndJob | Tell
