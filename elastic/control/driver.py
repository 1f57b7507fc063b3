"""Executes the actions of the state machine: sends messages to workers, writes to etcd, and maintains the run directory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from elastic import errors
from elastic.control import balance, events, machine
from elastic.control.carrier import Death
from elastic.control.incident_log import IncidentLog, conflicting
from elastic.control.input_blame import loss_of
from elastic.control.link_figures import LinkFigures
from elastic.control.memory_ahead import prepare_memory
from elastic.control.outcome import failed
from elastic.control.preparing import Preparing
from elastic.control.spare_pings import SparePings
from elastic.control.spares import joiners
from elastic.control.state import JobPolicy, Phase, Resumed
from elastic.control.watch import Subjects, Watch
from elastic.control.world import Terms, World
from elastic.errors import CheckpointDamaged, Conflict, Deposed, ElasticError, EtcdUnavailable, MismatchError
from elastic.health.evidence import Observed
from elastic.health.limits import Limits
from elastic.health.verdict import Verdict
from elastic.host.channel import Message
from elastic.host.packed import Packed, unpacked
from elastic.membership.etcd_thread import DEADLINE_S, EtcdTask
from elastic.membership.founding import Ready, another_file, check_equal
from elastic.plan.site import LinkSpeed, Pair
from elastic.recovery.inventory import Inventory
from elastic.recovery.proposal import REPLACED_S, Proposal
from elastic.script.sources import changed
from elastic.settings import JobSettings
from elastic.view import Member, View


class Driver:
    """Runs one job from its first committed view on. All calls must come from the agent's event loop.

    `founder` is the announcement of the first view's coordinator: joiners must equal it. `resumed`: another agent has coordinated the job
    so far, and `view` is the committed one.
    """

    def __init__(self, world: World, settings: JobSettings, view: View, founder: Ready, resumed: Resumed | None = None) -> None:
        policy = JobPolicy(
            workers=settings.workers,
            min_workers=settings.min_workers,
            respawn=settings.respawn,
            checkpoints=bool(founder.settings.get("checkpoint")),
            hosts=world.several,
            spares=settings.spares,
        )
        now = world.clock()
        self.state = machine.running(view, policy, now) if resumed is None else machine.resumed(view, policy, resumed, now)
        self._world = world
        earlier = () if resumed is None else resumed.incidents
        self._incident_log = IncidentLog(world, founder.settings.get("micro_batch_size", 1), earlier)
        self._settings = settings
        self._founding, self._founder = view.coordinator, founder
        self._balance = balance.Balance(settings.stages, settings.min_workers)
        self._link_figures = LinkFigures()
        self._preparing = Preparing(world.timers, world.clock, settings.stages, self._measured, self._idle, self._spare)
        self._finished, self._dead, self._ending = set[int](), set[int](), set[int]()
        self._lost_at: float | None = None
        self._saved = False
        self._packed: Packed | None = None  # the last proposal, encoded
        self._replaced_s = REPLACED_S
        self._events: deque[events.Event] = deque()
        self._feeding = False
        subjects = lambda: Subjects.of(self.state)  # noqa: E731
        self._watch = Watch(
            world.carrier, world.timers, Limits.of(settings), subjects, self._exclude, world.say, world.clock, self._looked, self._host
        )
        waiting = lambda: self.state.spares - self.state.participants - self.state.evicted  # noqa: E731
        self._pings = SparePings(world.carrier, world.timers, waiting, self._check_spares, self._give_up, world.clock)
        self._announce(events.Announce(view=view))
        self._watch.look()
        self._set_timer()

    @property
    def view(self) -> View:
        """The last committed view."""
        return self.state.view

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """The job's incidents, as JSON of `elastic.observe.incident.Incident`."""
        return self._incident_log.incidents

    # Calls from the agent

    def heard(self, worker: int, message: Message) -> None:
        """Handles a worker's message about the members of the job; ignores other messages."""
        handler = _MESSAGES.get(message["type"])
        if handler is not None:
            handler(self, worker, message)

    def died(self, *deaths: Death) -> None:
        """Handles the ends of workers' processes before these finished. Those of one host end together: one attempt goes on without all."""
        members = [death for death in deaths if not self.joining(death.worker)]
        for death in (*(death for death in deaths if self.joining(death.worker)), *members):
            self._died(death, more=death in members[:-1])
        if deaths:
            self._world.etcd_thread.run(EtcdTask(call=lambda: self._world.dismiss([death.worker for death in deaths])))

    def _died(self, death: Death, *, more: bool) -> None:
        now = self._world.clock()
        self._dead.add(death.worker)
        loss = None
        if death.worker in self.view.workers:
            self._incident_log.lost(self.view, death, now)
            self._lost_at, loss = now, loss_of(self.view, death, self._incident_log.causes.get(death.worker))
        self._incident_log.forget(death.worker)
        self._check_spares()
        self.feed(events.WorkerDied(worker=death.worker, how=death.how, loss=loss, more=more))

    def finished(self, worker: int) -> None:
        """Handles a worker's result."""
        self._finished.add(worker)
        if self.joining(worker):
            self._end_worker(worker, "train_fn returned before it made a Trainer")
        else:
            self.feed(events.WorkerFinished(worker=worker))

    def failed_to_join(self, worker: int, why: str) -> None:
        """Handles an exception of a worker that is not a member yet."""
        self._end_worker(worker, why)

    def joining(self, worker: int) -> bool:
        """Whether the worker is not a member (yet)."""
        return worker not in self.state.view.workers

    def seen(self, view: View) -> None:
        """Handles a view that is committed in etcd."""
        self.feed(events.Committed(view=view))

    def has_room(self, workers: int, spares: int = 0, rooms: Mapping[str, int] | None = None) -> None:
        """Handles hosts that have come or gone: so many workers and spares are wanted. `rooms` is the room for members by host."""
        self._check_spares()
        self.feed(events.Room(workers=workers, spares=spares, rooms=rooms or {}))

    def drain(self, workers: Iterable[int], why: str) -> None:
        """Makes workers leave at the next boundary, after they have sent what they own."""
        self._check_spares()
        self.feed(events.Draining(workers=frozenset(workers).intersection(self.view.workers), why=why))

    def missed(self, worker: int, at: float) -> None:
        """Notes when a member that is lost was heard last."""
        self._incident_log.missed(self.view.epoch, worker, at)

    def came_back(self, workers: Iterable[int]) -> None:
        """Handles a host that is back with the memory of these workers, which have ended; frees what nobody can need any more."""
        needed = self._dead.intersection(self.view.workers)
        self._world.carrier.release({*workers} - needed)
        if needed.intersection(workers) and self.state.phase is Phase.PAUSED:
            self.reopen()

    def died_before(self, workers: Iterable[int]) -> None:
        """Notes workers that had died before another coordinator was lost: their memory is offered, and freed with the next view's first
        step, as if they had died under this one."""
        self._dead.update(workers)

    def returns_not(self) -> None:
        """Notes that a host will not come back that may be waited for."""
        if self.state.return_at is not None:
            self.reopen()

    def reopen(self) -> None:
        """Opens an attempt although nobody has died, since workers may wait for the one that another coordinator has opened."""
        self.feed(events.Reopened())

    def stop(self) -> None:
        """Stops the job at the next step boundary, as the user asked."""
        self.feed(events.Stopping())

    def away(self, error: EtcdUnavailable, seconds: float = 0.0) -> None:
        """Informs the user that etcd has been unavailable for `seconds` while a recovery or a planned change needs it."""
        since = f", {seconds:.0f} s by now; the job ends after {DEADLINE_S:.0f} s" if seconds >= 1.0 else ""
        what = "the training goes on, and a planned change" if self.state.phase is Phase.BOUNDARY else "the recovery"
        since = since if self.state.phase is not Phase.BOUNDARY else ""
        self._world.say(f"{error}; {what} waits for it{since}")

    def close(self) -> None:
        """Ends all timers, preparations and the open incident, when the job is over."""
        self._world.timers.clear_timer("machine")
        self._watch.close()
        self._preparing.close()
        self._pings.close()
        self._incident_log.close()

    @property
    def complete(self) -> bool:
        """Whether all live members have finished, the leader among them."""
        workers = self.view.workers
        return workers[0] in self._finished and self._finished.union(self._dead).issuperset(workers)

    def feed(self, event: events.Event) -> None:
        """Passes an event to the state machine and executes the actions; events that result are handled afterwards."""
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
            self._world.timers.set_timer(wait, lambda: self.feed(events.Timeout()), "machine")

    def _host(self, worker: int) -> str:
        """Returns the host of a member, if the members are on several."""
        hosts = {member.worker: member.host for member in self.view.members}
        return hosts.get(worker, "") if len(set(hosts.values())) > 1 else ""

    def _check_spares(self) -> None:
        """Notes which spares cannot join now, before something happens for which they may be needed."""
        unable = self._pings.unable()
        if unable != self.state.unable:
            self.feed(events.Unable(workers=unable))

    def _give_up(self, worker: int, why: str) -> None:
        if self._settings.hung_after is not None:
            self.feed(events.Unresponsive(worker=worker, why=why))

    def _exclude(self, found: Verdict) -> None:
        """Replaces a worker that fails without announcing it; its fault began when it was first seen in that condition."""
        self._incident_log.found(self.view.epoch, found, self._world.clock())
        self.feed(events.Unresponsive(worker=found.worker, why=found.why))

    # Messages

    def _hear_announce(self, worker: int, message: Message) -> None:
        if worker not in self.state.starting:
            return
        host = self._world.carrier.host_of(worker)
        try:
            ready = Ready.from_json(message["ready"], host, self._settings.memory)
            file = changed(ready.code, self._founder.code) if all(member.host != host for member in self.view.members) else None
            if file is not None and self._world.refuse(host, another_file(file)):
                return
            check_equal({self._founding: self._founder, worker: replace(ready, checkpoint=self._founder.checkpoint)})
        except MismatchError as error:
            self._end_worker(worker, str(error))
            return
        self._world.etcd_thread.run(EtcdTask(call=lambda: self._world.admit({worker: ready})))
        self.feed(events.JoinerReady(worker=worker, member=ready.member(worker)))
        if worker in self.state.spares:
            self._preparing.renew()

    def _hear_save(self, worker: int, message: Message) -> None:
        self._saved = self._saved or message["reason"] is None

    def _hear_progress(self, worker: int, message: Message) -> None:
        self._incident_log.told(worker, message)
        self._link_figures.note(worker, message.get("links", ()))
        if self._settings.rebalance and message.get("effort") is not None and self._incident_log.current is None:
            self._balance.note(self.view, worker, message)
            decided = self._balance.decide(self.view, self._world.clock()) if self.state.phase is Phase.RUNNING else None
            if isinstance(decided, Verdict):
                self._exclude(decided)
            elif decided is not None:
                self.feed(events.Unbalanced(slowdowns=decided))

    def _looked(self, seen: Sequence[Observed]) -> None:
        if self._settings.rebalance and self.state.phase is Phase.RUNNING and self._incident_log.current is None:
            self._balance.looked(self.view, seen)

    def _hear_code(self, worker: int, message: Message) -> None:
        self._watch.heard(worker, message)

    def _hear_lost(self, worker: int, message: Message) -> None:
        if not message.get("gone", True):
            self._world.say(message["reason"])
        if message["peer"] is not None:
            self._incident_log.missed(message["epoch"], message["peer"], message["at"])
        damaged = message.get("damaged", False) and message["epoch"] == self.view.epoch
        if damaged:
            self._incident_log.damaged(self.view, worker, message)
        reporter = {"reporter": worker, "peer": message["peer"], "epoch": message["epoch"], "reason": message["reason"]}
        unreadable = message["phase"] == CheckpointDamaged.__name__
        self.feed(events.LostLink(**reporter, damaged=damaged, unreadable=unreadable))

    def _hear_paused(self, worker: int, message: Message) -> None:
        if self._incident_log.current is None and self.state.phase is Phase.BOUNDARY:
            kind, why = ("join", None) if joiners(self.state, at_boundary=True) else ("rebalance", balance.sentence(self.state.slowdowns))
            if self.state.leaving:
                kind, why = "drain", next(iter(self.state.leaving.values()))
            self._incident_log.changes(self.view, kind, message["step"], why, sorted(self.state.leaving))
        self.feed(events.PausedAt(worker=worker, epoch=message["epoch"], step=message["step"]))

    def _hear_inventory(self, worker: int, message: Message) -> None:
        inventory = Inventory.from_json(unpacked(message["inventory"]))
        self.feed(events.Inventoried(worker=worker, attempt_id=_attempt_id(message), inventory=inventory))

    def _hear_vote(self, worker: int, message: Message) -> None:
        vote = events.Vote.from_json(worker, message)
        if _attempt_id(message) == self.state.attempt_id:
            self._incident_log.note(lambda timeline, now: timeline.voted(now, vote))
        self.feed(events.Voted(attempt_id=_attempt_id(message), vote=vote))

    def _hear_resumed(self, worker: int, message: Message) -> None:
        if message["epoch"] == self.view.epoch:
            self._incident_log.note(lambda timeline, _: timeline.resumed(worker, message["at"]))

    def _hear_committed(self, worker: int, message: Message) -> None:
        if message["epoch"] == self.view.epoch:
            self._incident_log.note(lambda timeline, _: timeline.first_commit(worker, message))
        if message["epoch"] == self.view.epoch:  # every member has what it needs of them
            self._world.carrier.release(self._dead.difference(self.view.workers))
        self.feed(events.FirstCommit(worker=worker, epoch=message["epoch"], step=message["step"]))

    # Actions

    def _ask_boundary(self, action: events.AskBoundary) -> None:
        """Sends the request once etcd answers: a worker at a boundary waits for etcd, and a loss of etcd must not stop the training."""

        def asked(_: Any = None) -> bool:
            return self.state.phase is Phase.BOUNDARY and self.view.epoch == epoch

        def tell(_: Any) -> None:
            if asked():
                self._world.carrier.tell(action.workers, {"type": "boundary"})

        epoch = self.view.epoch
        prepare_memory(self._world, self.state, self._terms())
        self._world.etcd_thread.run(EtcdTask(call=self._world.attempts.ask, done=tell, wanted=asked, deadline_s=math.inf))

    def _quiesce(self, action: events.Quiesce) -> None:
        self._incident_log.note(lambda timeline, now: timeline.opened(now))
        lost = [worker for worker in self.view.workers if worker not in action.workers]
        what = {"lost": lost, "restore": action.restore, "damaged": list(action.damaged)}

        def burned(_: Any) -> None:
            """Announces the attempt only after its number is burned: a later coordinator must not use the number again."""
            if self.state.attempt_id == action.attempt_id:
                self._world.carrier.tell(action.workers, {"type": "quiesce", **_attempt_fields(action.attempt_id), **what})

        self._at_etcd(action.attempt_id, lambda: self._world.attempts.begin(action.attempt_id), burned)

    def _propose(self, action: events.Propose) -> None:
        """Computes the proposal aside from the loop: with hundreds of workers that takes long. Another attempt may begin meanwhile."""
        self._incident_log.note(lambda timeline, now: timeline.inventoried(now))
        offers = self._world.carrier.offers(sorted(self._dead))
        terms = self._terms(offers)
        self._world.compute(lambda: _computed(self._world, action, terms), lambda found: self._computed(action, offers, found))

    def _computed(self, action: events.Propose, offers: Sequence[Inventory], found: tuple[Proposal, Packed] | ElasticError) -> None:
        if action.attempt_id != self.state.attempt_id:
            return
        if isinstance(found, ElasticError):
            self._unproposable(action, offers, found)
            return
        proposal, self._packed = found
        if proposal.conflicts:
            why, findings = conflicting(proposal.conflicts, self.view, proposal.resume)
            self._world.say(why)
            self._incident_log.note(lambda timeline, _: timeline.differ(why, findings))
        self.feed(events.Proposed(attempt_id=action.attempt_id, proposal=proposal))

    def _unproposable(self, action: events.Propose, offers: Sequence[Inventory], error: ElasticError) -> None:
        kind = type(error).__name__ if type(error) in _PASSED_ON else "JobFailed"
        if isinstance(error, errors.NothingSaved) and (self._saved or self._founder.checkpoint is not None):
            kind = "CoverageLost"  # a saved checkpoint is gone: beginning again at step 0 would lose its steps
        there = {self._world.carrier.host_of(worker) for worker in action.inventories}
        elsewhere = kind == "CoverageLost" and any(self._world.carrier.host_of(offer.worker) not in there for offer in offers)
        returning = self._world.carrier.may_return(self._dead.intersection(self.view.workers))
        why = {"kind": kind, "message": str(error), "back": getattr(error, "back", None), "elsewhere": elsewhere, "returning": returning}
        why["unbegun"] = kind == "CoverageLost" and getattr(error, "known", None) == -1
        self.feed(events.Unproposable(attempt_id=action.attempt_id, **why))

    def _terms(self, offers: Sequence[Inventory] = ()) -> Terms:
        links, prepared = self._preparing.links, self._preparing.prepared
        return Terms(
            stages=self._settings.stages,
            links=links,
            replaced_s=self._replaced_s,
            prepared=prepared,
            offers=offers,
            homes={offer.worker: self._world.carrier.host_of(offer.worker) for offer in offers},
            hosts=self._world.hosts(),
            clocking=self._world.clocking(),
        )

    def _offer(self, action: events.Offer) -> None:
        self._incident_log.note(lambda timeline, now: timeline.proposed(now, action.proposal))
        assert self._packed is not None  # it came with the proposal
        packed = self._packed
        to = (*action.proposal.view.workers, *(member.worker for member in action.proposal.leaving))
        order = {"type": "propose", **_attempt_fields(action.attempt_id), "proposal": packed}
        self._world.carrier.tell(to, order, action.proposal.segments)
        self._at_etcd(action.attempt_id, lambda: self._world.attempts.publish(action.attempt_id, packed.value))

    def _commit(self, action: events.Commit) -> None:
        view, before, attempts = action.proposal.view, self.view, self._world.attempts
        votes = {worker: vote.refusal for worker, vote in action.votes.items()}

        def commit() -> None:
            attempts.vote(action.attempt_id, votes)
            attempts.commit(action.attempt_id, view, before)

        self._world.etcd_thread.run(
            EtcdTask(
                call=commit,
                done=lambda _: self.seen(view),
                refused=lambda error: self._refused(action.attempt_id, error),
            )
        )

    def _announce(self, action: events.Announce) -> None:
        view, current = action.view, self._incident_log.current
        self._incident_log.note(lambda timeline, now: timeline.committed(now, view, action.spares))
        joined = set(view.workers).difference(() if current is None else current.before.workers, action.spares)
        if current is not None and self._lost_at is not None and joined:
            self._replaced_s, self._lost_at = self._world.clock() - self._lost_at, None
        order = {"type": "view", **_attempt_fields((view.epoch, view.attempt)), "view": Packed(view.to_json())}
        self._world.carrier.tell(view.workers, order, view.workers if view.epoch == 1 else ())
        self._link_figures.keep(view.workers)
        self._world.committed(view)
        self._world.carrier.record(view)
        self._preparing.begin(view)
        if view.epoch > 1:
            self._world.etcd_thread.run(EtcdTask(call=self._world.attempts.sweep, needed=False))

    def _evict(self, action: events.Evict) -> None:
        self._end_worker(action.worker, action.why)

    def _respawn(self, action: events.Respawn) -> None:
        self._world.carrier.start(action.workers)

    def _end(self, action: events.EndJob) -> None:
        failure = failed(getattr(errors, action.kind), action.message)
        self._world.end(self._world.without_the_rest(failure) if action.closing else failure)

    def _tell(self, action: events.Tell) -> None:
        self._world.say(action.sentence)

    def _measured(self) -> Mapping[Pair, LinkSpeed]:
        return self._link_figures.links({member.worker: member.host for member in self.view.members}, self.view.site)

    def _idle(self) -> bool:
        return self._incident_log.current is None and self.state.phase is Phase.RUNNING

    def _spare(self) -> Member | None:
        """Returns the spare that would join next."""
        return next((self.state.ready[worker] for worker in sorted(self.state.spares)), None)

    def _at_etcd(self, attempt_id: events.AttemptId, call: Callable[[], Any], done: Callable[[Any], None] = lambda _: None) -> None:
        """Runs a task for this attempt, unless another attempt has begun by then."""

        def refused(error: Conflict) -> None:
            self._refused(attempt_id, error)

        self._world.etcd_thread.run(EtcdTask(call=call, done=done, refused=refused, wanted=lambda: self.state.attempt_id == attempt_id))

    def _refused(self, attempt_id: events.AttemptId, error: Conflict) -> None:
        if isinstance(error, Deposed) and self._world.several:
            self._world.deposed(str(error))
        else:
            self.feed(events.CommitFailed(attempt_id=attempt_id, reason=str(error)))

    def _end_worker(self, worker: int, why: str) -> None:
        if worker not in self._ending:
            self._ending.add(worker)
            self._world.carrier.end(worker, why)


def _computed(world: World, action: events.Propose, terms: Terms) -> tuple[Proposal, Packed] | ElasticError:
    """Returns a proposal, and the same encoded; or why there is none."""
    try:
        proposal = world.propose(action, terms)
    except ElasticError as error:
        return error
    packed = Packed(proposal.to_json())
    packed.encode()
    return proposal, packed


_PASSED_ON = (errors.CoverageLost, errors.NothingSaved, errors.CopiesConflict, errors.StateUnproven, errors.PlanError)

_MESSAGES: dict[str, Callable[[Driver, int, Message], None]] = {
    "announce": Driver._hear_announce,
    "save": Driver._hear_save,
    "progress": Driver._hear_progress,
    "code": Driver._hear_code,
    "lost": Driver._hear_lost,
    "paused": Driver._hear_paused,
    "inventory": Driver._hear_inventory,
    "vote": Driver._hear_vote,
    "resumed": Driver._hear_resumed,
    "committed": Driver._hear_committed,
}

_ACTIONS: dict[type[events.ControlAction], Callable[[Driver, Any], None]] = {
    events.AskBoundary: Driver._ask_boundary,
    events.Quiesce: Driver._quiesce,
    events.Propose: Driver._propose,
    events.Offer: Driver._offer,
    events.Commit: Driver._commit,
    events.Announce: Driver._announce,
    events.Evict: Driver._evict,
    events.Respawn: Driver._respawn,
    events.EndJob: Driver._end,
    events.Tell: Driver._tell,
}


def _attempt_id(message: Message) -> events.AttemptId:
    return message["epoch"], message["attempt"]


def _attempt_fields(attempt_id: events.AttemptId) -> dict[str, int]:
    return {"epoch": attempt_id[0], "attempt": attempt_id[1]}
