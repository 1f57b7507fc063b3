"""A state machine with fake views and proposals, and the operations that tests apply to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elastic.control import machine
from elastic.control.attempt import SETTLING_S
from elastic.control.events import (
    Committed,
    ControlAction,
    EndJob,
    Event,
    Inventoried,
    JoinerReady,
    PausedAt,
    Proposed,
    Tell,
    Timeout,
    Vote,
    Voted,
    WorkerDied,
)
from elastic.control.state import ControlState, JobPolicy, Phase
from elastic.view import Member


@dataclass(frozen=True)
class FakeView:
    epoch: int
    attempt: int
    workers: tuple[int, ...]
    outlive: bool = False

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(Member(worker=worker, host="here", address=f"unix:{worker}", segment=self.outlive) for worker in self.workers)


@dataclass(frozen=True)
class FakeProposal:
    view: FakeView


@dataclass
class Machine:
    """The state machine with short methods for events; keeps its actions since the last `done`."""

    state: ControlState
    now: float = 100.0
    actions: list[ControlAction] = field(default_factory=list)

    def feed(self, *events: Event) -> Machine:
        for event in events:
            self.state, actions = machine.step(self.state, event, self.now)
            self.actions += actions
        return self

    def wait(self, seconds: float) -> Machine:
        self.now += seconds
        return self.feed(Timeout())

    @property
    def done(self) -> list[ControlAction]:
        actions, self.actions = self.actions, []
        return [action for action in actions if not isinstance(action, Tell)]

    @property
    def told(self) -> str:
        return "\n".join(action.sentence for action in self.actions if isinstance(action, Tell))

    @property
    def phase(self) -> Phase:
        return self.state.phase

    def die(self, worker: int, **more: Any) -> Machine:
        return self.feed(WorkerDied(worker=worker, how=f"worker {worker} fell", **more))

    def inventories(self) -> Machine:
        """Everybody in the attempt answers."""
        return self.feed(*(Inventoried(worker=worker, attempt_id=self.state.attempt_id, inventory=Any) for worker in self.state.missing))

    def proposed(self) -> Machine:
        view = FakeView(*self.state.attempt_id, tuple(sorted(self.state.participants)), self.state.view.members[0].segment)
        return self.feed(Proposed(attempt_id=self.state.attempt_id, proposal=FakeProposal(view)))

    def vote(self, worker: int, **more: Any) -> Machine:
        return self.feed(Voted(attempt_id=self.state.attempt_id, vote=Vote(worker=worker, **more)))

    def votes(self) -> Machine:
        for worker in self.state.missing:
            self.vote(worker)
        return self

    def committed(self) -> Machine:
        assert self.state.proposal is not None
        return self.feed(Committed(view=self.state.proposal.view))

    def recover(self) -> Machine:
        """The rest of the attempt under way, and the time until new workers are started."""
        self.inventories().proposed().votes()
        return self.committed().wait(SETTLING_S)

    def ready(self, worker: int) -> Machine:
        return self.feed(JoinerReady(worker=worker, member=Any))

    def ended(self) -> str:
        last = self.actions[-1]
        assert isinstance(last, EndJob)
        assert self.phase is Phase.ENDED
        return last.message


def running(workers: int = 3, *, outlive: bool = False, **policy: Any) -> Machine:
    """A job in epoch 1; dead workers are replaced only if asked for."""
    options = {"workers": workers, "respawn": False, **policy}
    return Machine(machine.running(FakeView(1, 0, tuple(range(workers)), outlive), JobPolicy(**options)))


def at_boundary() -> Machine:
    """Worker 1 of three has died, and worker 3 is let in: everybody has paused for it."""
    job = running(respawn=True).die(1).recover().ready(3).feed(Timeout())
    return job.feed(PausedAt(worker=0, epoch=2, step=4), PausedAt(worker=2, epoch=2, step=4))
