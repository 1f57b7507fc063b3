"""Breaks each rule of the protocol in the real code and tests that the failure it prevents then occurs, but not otherwise."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from elastic.comm import Endpoint, LoopbackHub, LoopbackNetwork, MessageKind, Tag
from elastic.comm.mailbox import Mailbox
from elastic.control import machine
from elastic.control.events import Offer, Proposed, Vote, Voted
from elastic.control.state import Phase
from elastic.errors import CoverageLost, GateRefused
from elastic.recovery import proposal
from elastic.snapshot.replication import Replicator
from elastic.worker.job import Job
from elastic.worker.recovery_client import HeldState, RecoveryClient
from tests.recovery import forks
from tests.recovery.forks import Agent, die, when
from tests.recovery.machines import FakeProposal, FakeView, running
from tests.recovery.recovering import inventories_of, view_of
from tests.recovery.test_machine_properties import live_through

STEP = 2


@cache
def calm() -> dict[str, Any]:
    """Returns the results of a single worker."""
    return forks.run(1).results[0]


def goes_on(agent: Agent, *left: int) -> None:
    """The workers that are left have come to what they would have come to."""
    assert agent.live == list(left)
    digests = {worker: result.pop("digest") for worker, result in agent.results.items()}
    assert all(agent.results[worker] == {"reports": calm()["reports"]} for worker in left)
    assert digests[left[0]] == calm()["digest"]


# READY means that the replicas of the previous step are complete


def stall_updates(to: int) -> None:
    """Drops the messages by which this worker keeps the replicas of STEP on worker `to` up to date."""
    send = Endpoint.send

    def stalled(network: Endpoint, peer: int, tag: Tag, *buffers: Any) -> None:
        if (tag.kind, tag.step, peer) != (MessageKind.REPLICA, STEP, to):
            send(network, peer, tag, *buffers)

    Endpoint.send = stalled


def stalled_and_killed(mutate: Callable[[Job], None], patience_s: float) -> Callable[[Job], None]:
    """Worker 1's updates for worker 2 stall; it dies when it may apply the next step, or when it has waited for that in vain."""

    def prepare(job: Job) -> None:
        mutate(job)
        if job.worker == 1:
            stall_updates(to=2)
            when(job, "ready", STEP + 1, threading.Timer(patience_s, die).start)
            when(job, "apply", STEP + 1, die)

    return prepare


def ready_without_replicas(job: Job) -> None:
    """A member that takes the updates that have come, and says READY."""
    Replicator.confirm = Replicator.settle


def apply_without_ready(job: Job) -> None:
    """A coordinator that does not wait for worker 2: it takes what that one said of the step before."""
    receive, last = Endpoint.receive, {}

    def hasty(network: Endpoint, peer: int, tag: Tag, **options: Any) -> np.ndarray:
        if (tag.kind, tag.step, peer) == (MessageKind.CONTROL_READY, 2 * (STEP + 1), 2):
            return last[peer]
        found = receive(network, peer, tag, **options)
        if tag.kind == MessageKind.CONTROL_READY:
            last[peer] = found
        return found

    if job.worker == 0:
        Endpoint.receive = hasty


@pytest.mark.slow
def test_a_step_is_applied_only_when_the_replicas_of_the_one_before_are_complete() -> None:
    agent = forks.run(3, prepare=stalled_and_killed(lambda job: None, 0.3))
    goes_on(agent, 0, 2)
    assert agent.proposals[0].resume == STEP - 1, "nobody has applied the step whose READY was missing"


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [ready_without_replicas, apply_without_ready])
def test_without_ready_a_death_costs_the_state(mutation: Callable[[Job], None]) -> None:
    with pytest.raises(CoverageLost, match=f"step {STEP - 1} was complete everywhere, so no earlier one is kept"):
        forks.run(3, prepare=stalled_and_killed(mutation, 20.0))


# Old copies are kept until a step of the new view is committed


def first_death(job: Job) -> None:
    if job.worker == 1:
        when(job, "forward", STEP, die)


def freed_with_the_vote(job: Job) -> None:
    """A worker releases its old copies once it has built its place in the proposed view."""
    first_death(job)
    prepared = RecoveryClient._prepared

    def hasty(member: RecoveryClient, proposal: Any, held_state: Any, *rest: Any) -> Any:
        done = prepared(member, proposal, held_state, *rest)
        held_state.held.clear()
        return done

    RecoveryClient._prepared = hasty


def freed_with_the_view(job: Job) -> None:
    """A worker releases its old copies once it learns that the view is committed."""
    first_death(job)
    recover = RecoveryClient.recover
    RecoveryClient.recover = lambda member, *rest: dataclasses.replace(recover(member, *rest), retained=())


@pytest.fixture
def exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans whose last two workers have each other's place, so that more moves than must; the last of three stages has two layers."""
    found = proposal.plan

    def with_moves(fleet: Any, *rest: Any, **options: Any) -> Any:
        planned = found(fleet, *rest, **options)
        workers = planned.plan.workers
        other = dict(zip(workers, [*workers[:-2], *workers[:-3:-1]], strict=True))
        layers = [stage.layers for stage in planned.plan.stages]
        if len(layers) == 3:
            layers = [range(1), range(1, 2), range(2, 4)]
        stages = tuple(
            dataclasses.replace(stage, layers=own, members=tuple(other[member] for member in stage.members))
            for stage, own in zip(planned.plan.stages, layers, strict=True)
        )
        routes = tuple(tuple(other[member] for member in route) for route in planned.plan.routes)
        return dataclasses.replace(planned, plan=dataclasses.replace(planned.plan, stages=stages, routes=routes))

    monkeypatch.setattr(proposal, "plan", with_moves)


def kill_one(agent: Agent) -> None:
    agent.kill(3)


def kill_two(agent: Agent) -> None:
    agent.kill(0, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("exchanged")
@pytest.mark.parametrize(("kills", "left"), [({"at_commit": kill_one}, (0, 2)), ({"committed": kill_two}, (3,))])
def test_deaths_before_the_first_step_of_the_new_view_are_survived(kills: dict[str, Any], left: tuple[int, ...]) -> None:
    agent = forks.run(4, 4, prepare=first_death, **kills)
    goes_on(agent, *left)
    assert [proposal.resume for proposal in agent.proposals] == [STEP - 1, STEP - 1], "no step was committed in between"


@pytest.mark.slow
@pytest.mark.usefixtures("exchanged")
@pytest.mark.parametrize(
    ("mutation", "kills"), [(freed_with_the_vote, {"at_commit": kill_one}), (freed_with_the_view, {"committed": kill_two})]
)
def test_without_the_old_copies_they_are_not(mutation: Callable[[Job], None], kills: dict[str, Any]) -> None:
    with pytest.raises(CoverageLost, match="no surviving worker has a full copy of"):
        forks.run(4, 4, prepare=mutation, **kills)


@pytest.mark.slow
@pytest.mark.usefixtures("exchanged")
@pytest.mark.parametrize("mutation", [freed_with_the_vote, freed_with_the_view])
def test_where_nobody_else_dies_freeing_early_is_not_seen(mutation: Callable[[Job], None]) -> None:
    goes_on(forks.run(4, 4, prepare=mutation), 0, 2, 3)


# A message of an earlier attempt is ignored


@dataclasses.dataclass(frozen=True)
class Peer:
    worker: int
    host: str = "here"
    address: str = ""


PEERS = (Peer(0), Peer(1))
OLD, NEW = np.full(64, 1, dtype=np.uint8), np.full(64, 2, dtype=np.uint8)
UPDATE = Tag(MessageKind.PARAMETER, 7, 1)


def deliver_late() -> tuple[np.ndarray, int]:
    """Worker 0 sends an update in attempt (1, 0) and again in (2, 1), which worker 1 is in already: what it gets, messages dropped."""
    hub = LoopbackHub()
    sender, receiver = LoopbackNetwork(0, hub), LoopbackNetwork(1, hub)
    other = threading.Thread(target=lambda: sender.install(1, 0, PEERS, [1]))
    other.start()
    receiver.install(1, 0, PEERS, [0])
    other.join()
    receiver.install(2, 1, PEERS, [])
    memory = np.zeros(64, dtype=np.uint8)
    receiver.post(0, UPDATE, memory)
    sender.send(1, UPDATE, OLD)
    sender.install(2, 1, PEERS, [])
    sender.send(1, UPDATE, NEW)
    receiver.receive(0, UPDATE)
    found = memory.copy(), receiver.stats.stale_dropped
    sender.close()
    receiver.close()
    return found


def test_a_late_message_is_dropped() -> None:
    memory, dropped = deliver_late()
    assert (memory.tolist(), dropped) == (NEW.tolist(), 1)


def test_without_the_mailboxs_check_a_late_message_is_taken_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Mailbox.begin
    monkeypatch.setattr(Mailbox, "begin", lambda box, key, size: begin(box, (max(key[0], box.attempt_id), *key[1:]), size))
    memory, dropped = deliver_late()
    assert (memory.tolist(), dropped) == (OLD.tolist(), 0)


def careless(monkeypatch: pytest.MonkeyPatch, handler: type) -> None:
    """A machine that takes an answer to an earlier attempt for one to this."""
    careful = machine._HANDLERS[handler]
    monkeypatch.setitem(
        machine._HANDLERS, handler, lambda state, event, now: careful(state, dataclasses.replace(event, attempt_id=state.attempt_id), now)
    )


def many_lives() -> None:
    for seed in range(100):
        live_through(seed, 4, 1, respawn=True)


@pytest.mark.parametrize(("handler", "seen"), [(Proposed, "Phase.MIGRATING"), (Voted, "a missing vote")])
def test_without_the_machines_check_an_answer_of_an_earlier_attempt_counts(
    handler: type, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's property test, which passes unbroken, fails: it waits for ever, or would commit without votes."""
    careless(monkeypatch, handler)
    with pytest.raises(AssertionError, match=seen):
        many_lives()


# A new coordinator adopts no proposal (etcd's part: tests/membership/test_adoption.py)


def test_a_member_does_not_switch_to_an_adopted_view() -> None:
    """It has given its inventory for a later attempt, so it has nothing prepared."""
    quiesce = {"type": "quiesce", "epoch": 4, "attempt": 2, "lost": [2], "restore": False}
    orders = iter([quiesce, {"type": "view", "view": view_of([0, 1]).to_json()}])

    class FakeJob:
        worker = 0
        sent: list[Any] = []  # noqa: RUF012

        def take_order(self) -> Any:
            return next(orders)

        def enter(self, phase: str, step: int) -> None:
            pass

        def send(self, message: Any) -> None:
            self.sent.append(message["type"])

    found = inventories_of(view_of([0, 1, 2]), [0])[0]
    held_state = HeldState(held=[], yielded=4, progress={}, results=[])
    network = LoopbackNetwork(0, LoopbackHub())
    job: Any = FakeJob()
    member = RecoveryClient(job, network, None, None, None)  # pyright: ignore[reportArgumentType]
    member._inventory = lambda held_state, lost: found  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(GateRefused, match="was sent epoch 3, which it did not vote for"):
        member.recover(lambda lost: held_state, view_of([0, 1, 2]), ())
    assert job.sent == ["inventory"]


def test_votes_for_an_adopted_proposal_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that offers a proposal of an earlier attempt gets votes for that one, and never to a commit."""
    careless(monkeypatch, Proposed)
    job = running(4).die(1).inventories().die(2).inventories()
    _ = job.done
    adopted = FakeProposal(FakeView(2, 1, (0, 3)))
    job.feed(Proposed(attempt_id=(2, 1), proposal=adopted))
    assert job.done == [Offer(attempt_id=(2, 2), proposal=adopted)]
    for worker in (0, 3):
        job.feed(Voted(attempt_id=(2, 1), vote=Vote(worker=worker)))
    assert (job.phase, job.done) == (Phase.MIGRATING, [])
