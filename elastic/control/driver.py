"""Carries out what the state machine decides: tells workers, has etcd written to, and keeps the run directory."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from elastic import errors
from elastic.agent.supervision import Worker, failed, how_ended, own_doing
from elastic.control import balance, machine
from elastic.control.blame import Loss
from elastic.control.chronicle import Chronicle
from elastic.control.events import (
    Action,
    Announce,
    AskBoundary,
    Commit,
    CommitFailed,
    Committed,
    EndJob,
    Era,
    Event,
    Evict,
    Finished,
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
    Tell,
    Timeout,
    Unbalanced,
    Unproposable,
    Vote,
    Voted,
    WorkerDied,
)
from elastic.control.preparing import Preparing
from elastic.control.state import Phase, Policy
from elastic.control.wires import Wires
from elastic.control.world import Terms, World
from elastic.errors import CheckpointDamaged, Conflict, ElasticError, EtcdUnavailable, MismatchError
from elastic.host.channel import Message
from elastic.membership.clerk import DEADLINE_S, Errand
from elastic.membership.founding import Ready, check_equal
from elastic.observe.activity import STEP_PHASES, Doing
from elastic.observe.silence import LOOK_S, Seen, Silence, is_stopped
from elastic.plan.site import Link, Pair
from elastic.recovery.inventory import Inventory
from elastic.recovery.proposal import REPLACED_S
from elastic.settings import JobSettings
from elastic.view import View

_WEIGHED_EVERY_S = 1.0
_COMPUTING = ("forward", "backward")


class Driver:
    """Keeps one job going from its first committed view on. All calls belong to the agent's loop.

    `founder` is what the coordinator of the first view announced: joiners must equal it.
    """

    def __init__(self, world: World, settings: JobSettings, view: View, founder: Ready) -> None:
        policy = Policy(
            workers=settings.workers,
            min_workers=settings.min_workers,
            respawn=settings.respawn,
            checkpoints=bool(founder.settings.get("checkpoint")),
        )
        self.state = machine.running(view, policy)
        self._world = world
        self._chronicle = Chronicle(world, founder.settings.get("micro_batch_size", 1))
        self._settings = settings
        self._founding, self._founder = view.coordinator, founder
        self._reports, self._weigh_at = balance.Reports(), 0.0
        self._wires = Wires()
        self._preparing = Preparing(world.timers, world.clock, settings.stages, self._measured, self._idle)
        self._lost_at: float | None = None
        self._saved = False
        self._replaced_s = REPLACED_S
        self._events: deque[Event] = deque()
        self._feeding = False
        self._silence = Silence()
        self._announce(Announce(view=view))
        self._listen()

    @property
    def view(self) -> View:
        """The last committed one."""
        return self.state.view

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """What became of members, as `elastic.observe.incident.Incident` has it, in JSON."""
        return self._chronicle.incidents

    # What happens

    def heard(self, worker: Worker, message: Message) -> None:
        """A message of a worker that is about the members of the job; others are ignored."""
        handler = _MESSAGES.get(message["type"])
        if handler is not None:
            handler(self, worker, message)

    def died(self, worker: Worker) -> None:
        """The worker's process has ended, and it had not finished."""
        now = self._world.clock()
        doing = self._chronicle.doing(worker)
        if doing is not None:
            worker.epoch, worker.step = doing.epoch, doing.step
        worker.announced, worker.progress = None, {}
        how = how_ended(worker) + (f": {worker.condemned}" if worker.condemned else "")
        loss = None
        if worker.number in self.view.workers:
            self._chronicle.lost(self.view, worker, now)
            self._lost_at, loss = now, _loss(self.view, worker, doing)
        self.feed(WorkerDied(worker=worker.number, how=how, loss=loss))
        self._world.clerk.run(Errand(call=lambda: self._world.dismiss(worker.number)))

    def finished(self, worker: Worker) -> None:
        """The worker has sent its result."""
        if worker.announced is not None and worker.number in self.state.view.workers:
            self.feed(Finished(worker=worker.number))
        else:
            self._refuse(worker, "train_fn returned there before making a Trainer")

    def failed_to_join(self, worker: Worker, why: str) -> None:
        """A worker that is no member yet raised an exception."""
        self._refuse(worker, why)

    def joining(self, worker: Worker) -> bool:
        """Whether it is no member (yet)."""
        return worker.number not in self.state.view.workers

    def seen(self, view: View) -> None:
        """etcd has this view."""
        self.feed(Committed(view=view))

    def stop(self) -> None:
        """The user wants the job to stop at the next step boundary."""
        self.feed(Stopping())

    def away(self, error: EtcdUnavailable, seconds: float = 0.0) -> None:
        """etcd cannot be had while a recovery needs it, for so long."""
        since = f", {seconds:.0f} s by now; the job ends after {DEADLINE_S:.0f} s" if seconds >= 1.0 else ""
        what = "the training goes on, and a planned change" if self.state.phase is Phase.BOUNDARY else "the recovery"
        since = since if self.state.phase is not Phase.BOUNDARY else ""
        self._world.say(f"{error}; {what} waits for it{since}")

    def back(self) -> None:
        """etcd answers again."""
        self._world.say("etcd is back: what waited for it goes on")

    def close(self) -> None:
        """The job is over."""
        self._world.timers.clear_timer("machine")
        self._world.timers.clear_timer("silence")
        self._preparing.close()
        self._chronicle.close()

    @property
    def complete(self) -> bool:
        """Whether all members have finished, as far as they live, and the leader among them."""
        workers = [self._world.crew.workers[number] for number in self.view.workers]
        return workers[0].finished and all(worker.finished or worker.ended for worker in workers)

    def feed(self, event: Event) -> None:
        """Has the machine decide, and does what it says; events that this brings about come after."""
        self._events.append(event)
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._events:
                self.state, actions = machine.step(self.state, self._events.popleft(), self._world.clock())
                for action in actions:
                    _ACTIONS[type(action)](self, action)
        finally:
            self._feeding = False
        self._set_timer()

    def _set_timer(self) -> None:
        if self.state.wake_at is None:
            self._world.timers.clear_timer("machine")
        else:
            wait = max(0.0, self.state.wake_at - self._world.clock())
            self._world.timers.set_timer(wait, lambda: self.feed(Timeout()), "machine")

    def _listen(self) -> None:
        """Says who does not move, while the others wait for it."""
        now = self._world.clock()
        members = [self._world.crew.workers[worker] for worker in self.state.live if worker not in self.state.finished]
        seen = [Seen(worker=each.number, pid=each.pid, stopped=is_stopped(each.pid), doing=self._chronicle.doing(each)) for each in members]
        for sentence in self._silence.sentences(seen, now):
            self._world.say(sentence)
        self._world.timers.set_timer(LOOK_S, self._listen, "silence")

    # Messages

    def _hear_announce(self, worker: Worker, message: Message) -> None:
        if worker.number not in self.state.starting:
            return
        try:
            ready = Ready.from_json(message["ready"], self._founder.host, self._settings.memory)
            check_equal({self._founding: self._founder, worker.number: replace(ready, checkpoint=self._founder.checkpoint)})
        except MismatchError as error:
            self._refuse(worker, str(error))
            return
        self._world.clerk.run(Errand(call=lambda: self._world.admit(worker.number, ready)))
        worker.announced = {}  # it may be large, and has done its work
        self.feed(JoinerReady(worker=worker.number, member=ready.member(worker.number)))

    def _hear_save(self, worker: Worker, message: Message) -> None:
        self._saved = self._saved or message["reason"] is None

    def _hear_progress(self, worker: Worker, message: Message) -> None:
        worker.progress = message
        self._wires.note(worker.number, message.get("links", ()))
        if self._settings.rebalance and message.get("effort") is not None and self._chronicle.current is None:
            self._weigh(worker.number, message)

    def _weigh(self, worker: int, message: Message) -> None:
        """Asks for another plan if what the members have measured makes one worth it. Looks into it once a second at most."""
        self._reports.note(message["epoch"], worker, *message["effort"])
        now = self._world.clock()
        if now < self._weigh_at or self.state.phase is not Phase.RUNNING:
            return
        measured = self._reports.relative(self.view)
        if measured is None:
            return
        self._weigh_at = now + _WEIGHED_EVERY_S
        if balance.wanted(self.view, measured, self._settings.stages):
            self._reports.acted()
            self.feed(Unbalanced(slowdowns=measured))

    def _hear_lost(self, worker: Worker, message: Message) -> None:
        if not message.get("gone", True):
            self._world.say(message["reason"])
        if message["peer"] is not None:
            self._chronicle.missed(message["epoch"], message["peer"], message["at"])
        damaged = message.get("damaged", False) and message["epoch"] == self.view.epoch
        if damaged:
            self._chronicle.damaged(self.view, worker.number, message["step"], message["reason"], message["at"])
        reporter = {"reporter": worker.number, "peer": message["peer"], "epoch": message["epoch"], "reason": message["reason"]}
        unreadable = message["phase"] == CheckpointDamaged.__name__
        self.feed(LostLink(**reporter, damaged=damaged, unreadable=unreadable))

    def _hear_paused(self, worker: Worker, message: Message) -> None:
        if self._chronicle.current is None and self.state.phase is Phase.BOUNDARY:
            kind, why = ("join", None) if self.state.ready else ("rebalance", balance.sentence(self.state.slowdowns))
            self._chronicle.changes(self.view, kind, message["step"], why)
        self.feed(PausedAt(worker=worker.number, epoch=message["epoch"], step=message["step"]))

    def _hear_inventory(self, worker: Worker, message: Message) -> None:
        self.feed(Inventoried(worker=worker.number, era=_era(message), inventory=Inventory.from_json(message["inventory"])))

    def _hear_vote(self, worker: Worker, message: Message) -> None:
        vote = Vote.from_json(worker.number, message)
        if _era(message) == self.state.era:
            self._chronicle.note(lambda timeline, now: timeline.voted(now, vote))
        self.feed(Voted(era=_era(message), vote=vote))

    def _hear_resumed(self, worker: Worker, message: Message) -> None:
        if message["epoch"] == self.view.epoch:
            self._chronicle.note(lambda timeline, _: timeline.resumed(worker.number, message["at"]))

    def _hear_committed(self, worker: Worker, message: Message) -> None:
        if message["epoch"] == self.view.epoch:
            self._chronicle.note(lambda timeline, _: timeline.first_commit(message["at"], message["step"]))
        self.feed(FirstCommit(worker=worker.number, epoch=message["epoch"], step=message["step"]))

    # Actions

    def _ask_boundary(self, action: AskBoundary) -> None:
        """Once etcd answers: whoever stands at a boundary waits for it, and losing etcd does not stop the training."""

        def asked(_: Any = None) -> bool:
            return self.state.phase is Phase.BOUNDARY and self.view.epoch == epoch

        def tell(_: Any) -> None:
            if asked():
                self._world.crew.tell(action.workers, {"type": "boundary"})

        epoch = self.view.epoch
        self._world.clerk.run(Errand(call=self._world.attempts.ask, done=tell, wanted=asked, deadline_s=math.inf))

    def _quiesce(self, action: Quiesce) -> None:
        self._chronicle.note(lambda timeline, now: timeline.opened(now))
        lost = [worker for worker in self.view.workers if worker not in action.workers]
        what = {"lost": lost, "restore": action.restore, "damaged": list(action.damaged)}

        def burned(_: Any) -> None:
            """Only now may anybody hear of the attempt: whoever coordinates next must not use its number again."""
            if self.state.era == action.era:
                self._world.crew.tell(action.workers, {"type": "quiesce", **_era_fields(action.era), **what})

        self._at_etcd(action.era, lambda: self._world.attempts.begin(action.era), burned)

    def _propose(self, action: Propose) -> None:
        self._chronicle.note(lambda timeline, now: timeline.inventoried(now))
        try:
            terms = Terms(
                stages=self._settings.stages,
                links=self._preparing.links,
                replaced_s=self._replaced_s,
                prepared=self._preparing.prepared,
            )
            proposal = self._world.propose(action, terms)
        except ElasticError as error:
            kind = type(error).__name__ if type(error) in _PASSED_ON else "JobFailed"
            if isinstance(error, errors.NothingSaved) and (self._saved or self._founder.checkpoint is not None):
                kind = "CoverageLost"  # a checkpoint that there was is gone: to begin again would lose what it had
            self.feed(Unproposable(era=action.era, kind=kind, message=str(error)))
        else:
            self.feed(Proposed(era=action.era, proposal=proposal))

    def _offer(self, action: Offer) -> None:
        self._chronicle.note(lambda timeline, now: timeline.proposed(now, action.proposal))
        proposal = action.proposal.to_json()
        self._world.crew.tell(action.proposal.view.workers, {"type": "propose", "proposal": proposal})
        self._at_etcd(action.era, lambda: self._world.attempts.publish(action.era, proposal))

    def _commit(self, action: Commit) -> None:
        view, before, attempts = action.proposal.view, self.view, self._world.attempts
        votes = {worker: vote.refusal for worker, vote in action.votes.items()}

        def commit() -> None:
            attempts.vote(action.era, votes)
            attempts.commit(action.era, view, before)

        self._world.clerk.run(
            Errand(
                call=commit,
                done=lambda _: self.seen(view),
                refused=lambda error: self.feed(CommitFailed(era=action.era, reason=str(error))),
            )
        )

    def _announce(self, action: Announce) -> None:
        view, current = action.view, self._chronicle.current
        self._chronicle.note(lambda timeline, now: timeline.committed(now, view))
        if current is not None and self._lost_at is not None and set(view.workers).difference(current.before.workers):
            self._replaced_s, self._lost_at = self._world.clock() - self._lost_at, None
        self._world.crew.tell(view.workers, {"type": "view", "view": view.to_json()})
        self._wires.keep(view.workers)
        self._world.directory.write_members(self._members(view))
        self._preparing.begin(view)
        if view.epoch > 1:
            self._world.clerk.run(Errand(call=self._world.attempts.sweep, needed=False))

    def _evict(self, action: Evict) -> None:
        self._world.crew.kill(action.worker, action.why)

    def _respawn(self, action: Respawn) -> None:
        for number in action.workers:
            self._world.crew.fork(number)

    def _end(self, action: EndJob) -> None:
        self._world.end(failed(getattr(errors, action.kind), action.message))

    def _tell(self, action: Tell) -> None:
        self._world.say(action.sentence)

    # Details

    def _measured(self) -> Mapping[Pair, Link]:
        return self._wires.links({member.worker: member.host for member in self.view.members}, self.view.site)

    def _idle(self) -> bool:
        return self._chronicle.current is None and self.state.phase is Phase.RUNNING

    def _at_etcd(self, era: Era, call: Callable[[], Any], done: Callable[[Any], None] = lambda _: None) -> None:
        """For an attempt, and only as long as it is the one."""

        def refused(error: Conflict) -> None:
            self.feed(CommitFailed(era=era, reason=str(error)))

        self._world.clerk.run(Errand(call=call, done=done, refused=refused, wanted=lambda: self.state.era == era))

    def _refuse(self, worker: Worker, why: str) -> None:
        if not worker.condemned:
            self._world.crew.kill(worker.number, why)

    def _members(self, view: View) -> dict[str, Any]:
        workers = self._world.crew.workers
        return {
            "epoch": view.epoch,
            "attempt": view.attempt,
            "members": [
                {
                    "worker": member.worker,
                    "pid": workers[member.worker].pid,
                    "host": member.host,
                    "stage": view.plan.stage_of(member.worker),
                }
                for member in view.members
            ],
            "coordinator": view.coordinator,
            "agent": os.getpid(),
            "forkserver": self._world.crew.forkserver,
        }


_PASSED_ON = (errors.CoverageLost, errors.NothingSaved, errors.CopiesConflict, errors.StateUnproven, errors.PlanError)

_MESSAGES: dict[str, Callable[[Driver, Worker, Message], None]] = {
    "announce": Driver._hear_announce,
    "save": Driver._hear_save,
    "progress": Driver._hear_progress,
    "lost": Driver._hear_lost,
    "paused": Driver._hear_paused,
    "inventory": Driver._hear_inventory,
    "vote": Driver._hear_vote,
    "resumed": Driver._hear_resumed,
    "committed": Driver._hear_committed,
}

_ACTIONS: dict[type[Action], Callable[[Driver, Any], None]] = {
    AskBoundary: Driver._ask_boundary,
    Quiesce: Driver._quiesce,
    Propose: Driver._propose,
    Offer: Driver._offer,
    Commit: Driver._commit,
    Announce: Driver._announce,
    Evict: Driver._evict,
    Respawn: Driver._respawn,
    EndJob: Driver._end,
    Tell: Driver._tell,
}


def _loss(view: View, worker: Worker, doing: Doing | None) -> Loss:
    """What a member did when it died, as far as it has left word of it."""
    hosts = {member.worker: member.host for member in view.members}
    did = doing if doing is not None and doing.phase in STEP_PHASES else None
    computing = did is not None and did.phase in _COMPUTING and did.micro_batch >= 0
    return Loss(
        worker=worker.number,
        epoch=view.epoch,
        step=None if did is None else did.step,
        micro_batch=did.micro_batch if did is not None and computing else None,
        layers=tuple(view.plan.stages[view.plan.stage_of(worker.number)].layers),
        own=own_doing(worker),
        host=hosts[worker.number],
        elsewhere=len(set(hosts.values())) > 1,
    )


def _era(message: Message) -> Era:
    return message["epoch"], message["attempt"]


def _era_fields(era: Era) -> dict[str, int]:
    return {"epoch": era[0], "attempt": era[1]}
