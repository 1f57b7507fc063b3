"""Property tests of the state machine: for any order of events its invariants hold, and it always reaches a stable state."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic.control import machine
from elastic.control.events import (
    AskBoundary,
    Commit,
    CommitFailed,
    Committed,
    ControlAction,
    EndJob,
    Event,
    Evict,
    FirstCommit,
    Inventoried,
    JoinerReady,
    LostLink,
    Offer,
    PausedAt,
    Propose,
    Proposed,
    Quiesce,
    Respawn,
    Stopping,
    Timeout,
    Unable,
    Unproposable,
    Vote,
    Voted,
    WorkerDied,
    WorkerFinished,
)
from elastic.control.input_blame import MicroBatchLoss
from elastic.control.state import ControlState, JobPolicy, Phase
from elastic.control.transitions import FAILED_JOINS
from tests.recovery.machines import FakeProposal, FakeView


@dataclass
class World:
    """Workers and an etcd around a machine. What they answer lies in `post`, until it is delivered: in any order, or twice."""

    state: ControlState
    now: float = 0.0
    post: list[Event] = field(default_factory=list)
    delivered: list[Event] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)
    voted: set[tuple[tuple[int, int], int]] = field(default_factory=set)
    opened: list[tuple[int, int]] = field(default_factory=list)
    committed: list[tuple[int, int]] = field(default_factory=list)
    fits: int = 1  # the least number of members whose memory the model fits into

    def feed(self, event: Event) -> None:
        before = self.state
        self.state, actions = machine.step(before, event, self.now)
        assert self.state.attempt_id >= before.attempt_id, "it went back"
        for action in actions:
            self.check_joiners(before, action)
            self.answer(action)

    def check_joiners(self, before: ControlState, action: ControlAction) -> None:
        """Joiners start only outside recoveries, and are admitted when all workers have paused, unless they are spares or the job lacks
        workers."""
        if len(self.state.live) < max(self.state.policy.min_workers, self.fits):
            return
        if isinstance(action, Respawn):
            assert self.state.phase in (Phase.RUNNING, Phase.BOUNDARY)
        elif isinstance(action, Quiesce) and set(action.workers) - set(self.state.view.workers) - before.spares:
            assert before.phase is Phase.BOUNDARY
            assert len(before.missing) <= 1, "not all had paused"

    def answer(self, action: ControlAction) -> None:
        view = self.state.view
        if isinstance(action, Quiesce):
            assert action.attempt_id > max([(view.epoch, view.attempt), *self.opened])
            assert set(action.workers) <= self.known
            assert not set(action.workers) & self.state.unable - set(self.state.view.workers), "one that cannot join"
            assert len(action.workers) <= max(self.state.policy.workers, len(self.state.live)), "more than the job wants"
            self.opened.append(action.attempt_id)
            self.post += [Inventoried(worker=worker, attempt_id=action.attempt_id, inventory=Any) for worker in action.workers]
        elif isinstance(action, AskBoundary):
            self.post += [PausedAt(worker=worker, epoch=view.epoch, step=5) for worker in action.workers]
        elif isinstance(action, Propose):
            assert action.inventories.keys() <= self.known
            assert action.restore or set(action.inventories) & set(view.workers), "nobody has the state"
            assert self.state.policy.checkpoints or not action.restore
            if len(action.inventories) < self.fits:
                self.post.append(Unproposable(attempt_id=action.attempt_id, kind="PlanError", message="it does not fit"))
                return
            proposed = FakeView(*action.attempt_id, tuple(action.inventories))
            self.post.append(Proposed(attempt_id=action.attempt_id, proposal=FakeProposal(proposed)))
        elif isinstance(action, Offer):
            self.post += [Voted(attempt_id=action.attempt_id, vote=Vote(worker=worker)) for worker in action.proposal.view.workers]
        elif isinstance(action, Commit):
            members = action.proposal.view.workers
            assert action.attempt_id == self.opened[-1], "a stale attempt"
            assert {(action.attempt_id, worker) for worker in members} <= self.voted, "a missing vote"
            assert set(members) <= self.known, "with somebody who is known to be dead"
            assert all(attempt_id < action.attempt_id for attempt_id in self.committed)
            self.post.append(Committed(view=action.proposal.view))
        elif isinstance(action, Respawn):
            assert not set(action.workers) & (self.alive | self.state.dead), "a number used twice"
            self.alive |= set(action.workers)
            self.post += [JoinerReady(worker=worker, member=Any) for worker in action.workers]
        elif isinstance(action, EndJob):
            assert "input" not in action.message, "an input is blamed for what was done from outside"
        elif isinstance(action, Evict):
            self.post.append(WorkerDied(worker=action.worker, how="evicted"))

    @property
    def known(self) -> set[int]:
        return self.alive - self.state.dead

    def deliver(self, index: int) -> None:
        event = self.post.pop(index % len(self.post))
        self.delivered.append(event)
        if isinstance(event, Voted) and event.vote.passed:
            self.voted.add((event.attempt_id, event.vote.worker))
        if isinstance(event, Committed):
            assert (event.view.epoch, event.view.attempt) == self.opened[-1], "another attempt was opened while this one was committed"
            self.committed.append((event.view.epoch, event.view.attempt))
            self.post += [FirstCommit(worker=worker, epoch=event.view.epoch, step=6) for worker in event.view.workers]
        if not self.of_the_dead(event):
            self.feed(event)

    def of_the_dead(self, event: Event) -> bool:
        """Nothing more is heard of a worker after its death."""
        worker = event.vote.worker if isinstance(event, Voted) else getattr(event, "worker", None)
        return worker in self.state.dead and not isinstance(event, WorkerDied)

    def disturb(self, kind: str, index: int) -> None:
        workers = sorted(self.known)
        if kind == "deliver" and self.post:
            self.deliver(index)
        elif kind == "again" and self.delivered:
            event = self.delivered[index % len(self.delivered)]
            if not self.of_the_dead(event):
                self.feed(event)
        elif kind == "wait":
            self.now += index / 10
            self.feed(Timeout())
        elif kind == "unable":
            self.feed(Unable(workers=frozenset(worker for worker in self.state.ready if (worker + index) % 3)))
        elif kind == "stop":
            self.feed(Stopping())
        elif kind == "impossible" and self.state.phase is Phase.PROPOSING:
            self.feed(Unproposable(attempt_id=self.state.attempt_id, kind="CoverageLost", message="gone"))
        elif kind == "conflict" and self.state.phase is not Phase.COMMITTING:
            self.feed(CommitFailed(attempt_id=self.state.attempt_id, reason="conflict"))
        elif kind == "refused commit":
            pending = [event for event in self.post if isinstance(event, Committed)]
            for event in pending:
                self.post.remove(event)
                self.post.append(CommitFailed(attempt_id=(event.view.epoch, event.view.attempt), reason="conflict"))
        elif workers:
            self.befall(kind, workers[index % len(workers)], workers[index // 3 % len(workers)])

    def befall(self, kind: str, worker: int, other: int) -> None:
        if kind == "die":
            loss = MicroBatchLoss(
                worker=worker, epoch=self.state.view.epoch, step=other % 2, micro_batch=0, layers=(0,)
            )  # killed from outside
            self.feed(WorkerDied(worker=worker, how="died", loss=loss if worker in self.state.view.workers else None))
        elif kind == "lost":
            self.feed(LostLink(reporter=worker, peer=other if other != worker else None, epoch=self.state.view.epoch))
        elif kind == "refuse" and self.state.phase is Phase.MIGRATING:
            self.feed(Voted(attempt_id=self.state.attempt_id, vote=Vote(worker=worker, refusal="no")))
        elif kind == "unreachable" and self.state.phase is Phase.MIGRATING:
            self.feed(Voted(attempt_id=self.state.attempt_id, vote=Vote(worker=worker, refusal="link", failed_peer=other)))
        elif kind == "finish" and worker in self.state.view.workers:
            self.feed(WorkerFinished(worker=worker))

    def settle(self) -> None:
        self.feed(Unable(workers=frozenset()))
        for _ in range(2000):
            if self.post:
                self.deliver(0)
            elif self.state.wake_at is not None and self.state.phase is not Phase.ENDED:
                self.now = max(self.now, self.state.wake_at)
                self.feed(Timeout())
            else:
                return
        raise AssertionError(f"it does not come to rest: {self.state}")


WEIGHTS = {
    "deliver": 400,
    "die": 20,
    "again": 20,
    "wait": 20,
    "lost": 8,
    "unable": 4,
    "refuse": 4,
    "unreachable": 4,
    "refused commit": 4,
    "conflict": 2,
    "finish": 1,
    "stop": 1,
    "impossible": 1,
}


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    workers=st.integers(1, 6),
    min_workers=st.sampled_from([1, 1, 1, 2, 3, 6]),
    respawn=st.booleans(),
    checkpoints=st.booleans(),
    spares=st.sampled_from([0, 0, 1, 2]),
    fits=st.sampled_from([1, 1, 2, 3, 6]),
)
# One that could not join was replaced, and then could.
@example(seed=33194962, workers=5, min_workers=2, respawn=True, checkpoints=False, spares=0, fits=1)
def test_nothing_is_committed_wrongly_and_all_comes_to_rest(
    seed: int, workers: int, min_workers: int, respawn: bool, checkpoints: bool, spares: int, fits: int
) -> None:
    live_through(seed, workers, min_workers, respawn, checkpoints, spares, fits)


def live_through(
    seed: int, workers: int, min_workers: int, respawn: bool, checkpoints: bool = False, spares: int = 0, fits: int = 1
) -> None:
    """A life of a job with 150 disturbances; AssertionError where the machine does what it never may."""
    policy = JobPolicy(workers=workers, min_workers=min(workers, min_workers), respawn=respawn, checkpoints=checkpoints, spares=spares)
    world = World(machine.running(FakeView(1, 0, tuple(range(workers))), policy), alive=set(range(workers)), fits=min(workers, fits))
    chance = random.Random(seed)
    for kind in chance.choices([*WEIGHTS], [*WEIGHTS.values()], k=150):
        world.disturb(kind, chance.randrange(30))
    world.settle()
    assert world.state.phase in (Phase.RUNNING, Phase.ENDED)
    if world.state.phase is Phase.RUNNING:
        assert set(world.state.view.workers) - world.state.finished <= world.known
        assert len(world.state.view.workers) >= max(policy.min_workers, world.fits)
        if respawn and world.state.failed_joins < FAILED_JOINS and not (world.state.stopping or world.state.finished):
            assert len(world.state.view.workers) == workers, "nobody was let in for those who died"
            assert len(world.state.ready) == spares, "a spare is missing, or too many wait"
