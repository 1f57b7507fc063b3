"""Tests replicas by replay: they have their owner's bits after both of the last steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from elastic.comm import MessageKind, Tag
from elastic.errors import LinkError
from elastic.snapshot.held_copies import Held, StoredCopy, UnreplayedCopy
from tests.snapshot.replicating import OPTIMIZERS, Pair, copied, equal


@pytest.fixture
def pair() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(optimizer: str = "adamw") -> Pair:
        made.append(Pair(OPTIMIZERS[optimizer]))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replay_gives_the_owners_bits(pair: Callable[..., Pair], optimizer: str) -> None:
    workers = pair(optimizer)
    before = {}
    for step in range(5):
        workers.step(step, absent=step == 2)
        one, other = workers.workers
        for keeper, owner in ((one, other), (other, one)):
            assert {replica.step for replica in keeper.replicator.replicas} == {step - 1}
            for replica in keeper.replicator.replicas:
                key = replica.shard.layer, replica.shard.interval.start
                assert key in owner.optimizer.owned.shards
                if step:
                    assert equal(replica.shard.memory, before[key]), (step, key)
        before = {**copied(one.shards), **copied(other.shards)}
    for worker in workers.workers:
        worker.replicator.replay(4)
        for replica in worker.replicator.replicas:
            assert equal(replica.shard.memory, before[replica.shard.layer, replica.shard.interval.start])
            assert (replica.step, replica.received) == (4, None)


def test_scalars_are_replayed_too(pair: Callable[..., Pair]) -> None:
    workers = pair()
    for step in range(3):
        workers.step(step, absent=step == 1)
    one, other = workers.workers
    one.replicator.replay(2)
    for replica in one.replicator.replicas:
        owner = other.optimizer.owned
        kept = one.optimizer.kept.scalars(replica.shard)
        assert kept == owner.scalars(owner.shards[replica.shard.layer, replica.shard.interval.start])
    steps = {float(values["step"]) for replica in one.replicator.replicas for values in one.optimizer.kept.scalars(replica.shard).values()}
    assert steps == {2.0, 3.0}, "a parameter that had no gradient in one step is one behind"


def test_the_gradient_that_was_sent_stays_as_it_was_applied(pair: Callable[..., Pair]) -> None:
    worker = pair("writes to gradients").workers[0]
    gradients = worker.update(0)
    expected = worker.gradients(0, absent=False)
    assert all(torch.equal(sent.memory, random.memory * 0.5) for sent, random in zip(gradients, expected, strict=True))


def test_a_message_of_another_size_is_refused(pair: Callable[..., Pair]) -> None:
    workers = pair()
    one, other = workers.workers
    one.replicator.expect(0)
    replica = one.replicator.replicas[0]
    other.network.send(0, Tag(MessageKind.REPLICA, 0, replica.shard.layer, replica.shard.interval.start), b"x" * 100)
    with pytest.raises(LinkError, match="sent 100 bytes"):
        one.replicator.confirm()


# A replica that is given up


@pytest.fixture
def given_up(pair: Callable[..., Pair]) -> Pair:
    """Worker 0 has given up the first of its replicas, after step 3."""
    workers = pair()
    for step in range(4):
        workers.step(step)
    keeper = workers.workers[0]
    keeper.replicator.replay(3)
    shard = keeper.replicator.replicas[0].shard
    keeper.replicator.give_up({("replica", shard.layer, shard.interval.start)})
    return workers


def test_a_copy_that_was_given_up_is_not_given(given_up: Pair) -> None:
    keeper, _ = given_up.workers
    dropped = keeper.replicator.replicas[0].shard
    of_it = [c for c in keeper.replicator.held([1]) if (c.layer, c.start) == (dropped.layer, dropped.interval.start)]
    assert [(copy.role, copy.step) for copy in of_it] == [("previous replica", 2)]


def test_the_copies_behind_one_that_was_given_up_are_of_the_step_that_they_say(given_up: Pair) -> None:
    keeper, owner = given_up.workers
    now = {(s.layer, s.interval.start): s.memory for s in owner.shards}
    good = [copy for copy in keeper.replicator.held([1]) if copy.role == "replica"]
    assert len(good) == len(keeper.replicator.replicas) - 1
    for copy in good:
        assert copy.step == 3
        assert equal(copy.memory, now[copy.layer, copy.start])


# What a holder can give


def by_step(found: list[StoredCopy]) -> dict[int, list[StoredCopy]]:
    return {step: [copy for copy in found if copy.step == step] for step in {copy.step for copy in found}}


def test_both_steps_can_be_given(pair: Callable[..., Pair]) -> None:
    workers = pair("momentum")
    workers.step(0)
    workers.step(1)
    keeper, owner = workers.workers
    before = {(h.layer, h.start): h for h in owner.previous_copies.held}
    now = owner.optimizer.owned.shards
    found = by_step(keeper.replicator.held([]))
    assert found.keys() == {0, 1}
    for copy in found[0]:
        assert isinstance(copy, Held)
        assert equal(copy.memory, before[copy.layer, copy.start].memory)
        assert copy.scalars.keys() == before[copy.layer, copy.start].scalars.keys()
    for copy in found[1]:
        assert isinstance(copy, UnreplayedCopy)
        assert copy.owner == 1
        assert equal(copy.memory, now[copy.layer, copy.start].memory)
        assert equal(copy.memory, copy.memory), "made once"
    assert all(replica.step == 0 for replica in keeper.replicator.replicas), "the replicas themselves stay where they are"


@pytest.mark.parametrize("optimizer", ["adamw", "writes to gradients"])
def test_after_a_replay_the_step_before_can_still_be_given(pair: Callable[..., Pair], optimizer: str) -> None:
    """Some other holder may not have the newest one, so that all have to go back."""
    workers = pair(optimizer)
    for step in range(4):
        workers.step(step, absent=step == 2)
        workers.replay(step)
        keeper, owner = workers.workers
        before = {(h.layer, h.start): h for h in owner.previous_copies.held}
        now = owner.optimizer.owned
        found = by_step(keeper.replicator.held([1]))
        assert {at: {copy.role for copy in copies} for at, copies in found.items()} == {step: {"replica"}, step - 1: {"previous replica"}}
        for copy in found[step - 1]:
            assert equal(copy.memory, before[copy.layer, copy.start].memory)
            assert copy.scalars == before[copy.layer, copy.start].scalars
        for copy in found[step]:
            shard = now.shards[copy.layer, copy.start]
            assert equal(copy.memory, shard.memory)
            assert copy.scalars == now.scalars(shard)


def test_an_older_step_that_nobody_needs_is_not_given(pair: Callable[..., Pair]) -> None:
    workers = pair()
    for step in range(3):
        workers.step(step)
    assert by_step(workers.workers[0].replicator.held([1])).keys() == {1, 2}


def test_the_later_step_is_made_only_when_it_is_asked_for(pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    workers = pair()
    workers.step(0)
    keeper = workers.workers[0]
    made: list[int] = []
    replayed = keeper.optimizer.replayed
    monkeypatch.setattr(
        keeper.optimizer, "replayed", lambda shard, *rest, **more: made.append(shard.layer) or replayed(shard, *rest, **more)
    )
    found = by_step(keeper.replicator.held([]))[0]
    assert [(copy.layer, copy.start, copy.stop, copy.role) for copy in found] == [
        (r.shard.layer, r.shard.interval.start, r.shard.interval.stop, "replica") for r in keeper.replicator.replicas
    ]
    assert made == []
    assert found[0].memory is found[0].memory
    assert found[0].scalars
    assert made == [found[0].layer]
    of_the_dead = by_step(keeper.replicator.held([1]))[0]
    assert all(isinstance(copy, Held) for copy in of_the_dead)
    assert len(made) == 1 + len(of_the_dead)


def test_what_has_not_come_is_not_waited_for_and_not_given(pair: Callable[..., Pair]) -> None:
    workers = pair()
    workers.step(0)
    workers.replay(0)
    one, other = workers.workers
    one.publish(1, one.update(1))  # the other one has died before it published its own
    one.replicator.settle()
    assert {copy.step for copy in one.replicator.held([1])} == {0}
    other.replicator.settle()
    assert {copy.step for copy in other.replicator.held([0])} == {-1, 0}, "it has not asked for step 1"


def test_an_update_that_was_not_replayed_yet_does_not_change_the_owner(pair: Callable[..., Pair]) -> None:
    workers = pair()
    workers.step(0)
    keeper, owner = workers.workers
    before = copied(owner.shards)
    keeper.replicator.replay(0)
    keeper.replicator.replay(0)
    assert all(equal(before[s.layer, s.interval.start], s.memory) for s in owner.shards)
    assert keeper.replicator.peers == {1}
