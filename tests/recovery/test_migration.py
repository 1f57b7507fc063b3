"""Tests that a migration fills new memory with the right values, moves the least bytes, and does not change existing state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from elastic.comm import MessageKind
from elastic.errors import GateRefused, Interrupted, LinkError
from elastic.layout.transfer import PARAM
from elastic.recovery.proposal import Proposal
from elastic.worker.migration import Migration, links
from tests.recovery.migrating import SPEC, STATES, STEP, Job, Worker, bytes_missing, view

Make = Callable[..., Job]

CHANGES: dict[str, Any] = {
    "one of two dies": ((0, 1), 1, {"lost": [1]}),
    "one of three dies": ((0, 1, 2), 1, {"lost": [0]}),
    "the only one of its stage dies": ((0, 1, 2), 3, {"lost": [1], "stages": 2}),
    "one of two in a stage dies": ((0, 1, 2, 3), 2, {"lost": [3], "stages": 2}),
    "one dies and one joins": ((0, 1, 2), 2, {"lost": [2], "joined": [5], "stages": 2}),
    "two join": ((0, 1), 2, {"joined": [2, 4], "stages": 2}),
    "one joins the only one": ((0,), 1, {"joined": [1], "stages": 2}),
    "other stages": ((0, 1, 2), 1, {"stages": 3}),
    "as before": ((0, 1, 2), 2, {"stages": 2}),
}


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Job] = []

    def job(name: str) -> Job:
        workers, stages, change = CHANGES[name]
        made.append(Job(view(workers, stages), **{"stages": 1, **change}))
        return made[-1]

    yield job
    for one in made:
        one.close()


@pytest.mark.parametrize("name", CHANGES)
def test_every_worker_gets_its_place_and_no_byte_more_than_it_lacks(make: Make, name: str) -> None:
    job = make(name)
    before = {number: worker.contents() for number, worker in job.workers.items()}
    proposal = job.propose()
    expected = {number: bytes_missing(worker, proposal.view.layout) for number, worker in job.workers.items()}
    moved = job.migrate(proposal)
    job.check(proposal)
    assert {number: result.received_bytes for number, result in moved.items()} == expected
    assert sum(expected.values()) == proposal.bytes_minimum
    assert (proposal.bytes_minimum == 0) == (name in ("as before", "one of two dies"))
    assert {number: worker.contents() for number, worker in job.workers.items()} == before
    for result in moved.values():
        assert result.installed <= result.moved <= result.checked


def test_what_is_held_whole_is_taken_over(make: Make) -> None:
    job = make("as before")
    job.migrate(job.propose())
    for number, worker in job.workers.items():
        state = job.migrations[number].state
        held = {(h.layer, h.start, h.role): h.memory for h in worker.held}
        assert all(worker.model.flats[layer] is held[layer, 0, "gathered"][PARAM] for layer in worker.model.flats)
        for shard in state.owned:
            before = held[shard.layer, shard.interval.start, "live"]
            assert all(shard.memory[name].data_ptr() == before[name].data_ptr() for name in before)
        for shard in state.kept:
            before = held[shard.layer, shard.interval.start, "replica"]
            assert all(shard.memory[name] is before[name] for name in before)
        assert job.migrations[number].retained == []


def test_what_is_not_taken_over_is_retained_and_shares_no_memory(make: Make) -> None:
    job = make("other stages")
    job.migrate(job.propose())
    retained = 0
    for number, worker in job.workers.items():
        migration = job.migrations[number]
        shards = [*migration.state.owned, *migration.state.kept]
        used = {memory.untyped_storage().data_ptr() for shard in shards for memory in shard.memory.values()}
        used |= {flat.untyped_storage().data_ptr() for flat in worker.model.flats.values()}
        for copy in migration.retained:
            assert used.isdisjoint(memory.untyped_storage().data_ptr() for memory in copy.memory.values())
        kept = {id(copy) for copy in migration.retained}
        for copy in worker.held:
            if id(copy) not in kept:
                assert any(memory.untyped_storage().data_ptr() in used for memory in copy.memory.values())
        retained += len(migration.retained)
    assert retained


def test_copies_of_another_step_are_neither_used_nor_retained(make: Make) -> None:
    job = make("one of three dies")
    for worker in job.survivors.values():
        for held in list(worker.held):
            wrong = {name: memory + 1 for name, memory in held.memory.items()}
            worker.held.insert(0, dataclasses.replace(held, step=STEP - 1, role="previous", memory=wrong))
    proposal = job.propose()
    assert proposal.resume == STEP
    job.migrate(proposal)
    job.check(proposal)
    assert {copy.step for migration in job.migrations.values() for copy in migration.retained} <= {STEP}


# Failed attempts


def test_an_attempt_that_was_called_off_leaves_everything_for_the_next(make: Make) -> None:
    job = make("one dies and one joins")
    before = {number: worker.contents() for number, worker in job.workers.items()}
    first = job.propose()
    silent = job.workers[next(move.source for move in first.transfers)]
    send = silent.network.send

    def called_off(*_: Any) -> None:
        raise Interrupted("the members of the job change")

    silent.network.send = called_off  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(Interrupted):
        job.migrate(first)
    assert {number: worker.contents() for number, worker in job.workers.items()} == before
    silent.network.send = send
    second = job.propose(attempt=2)
    job.migrate(second)
    job.check(second)
    assert {number: worker.contents() for number, worker in job.workers.items()} == before


def test_an_attempt_that_was_finished_but_not_committed_leaves_everything_for_the_next(make: Make) -> None:
    job = make("one of two in a stage dies")
    before = {number: worker.contents() for number, worker in job.workers.items()}
    for attempt in (1, 2, 3):
        proposal = job.propose(attempt)
        job.migrate(proposal)
        job.check(proposal)
        assert {number: worker.contents() for number, worker in job.workers.items()} == before


def test_memory_that_was_prepared_is_none_that_is_held(make: Make) -> None:
    job = make("two join")
    before = {number: worker.contents() for number, worker in job.workers.items()}
    job.prepare(job.propose())
    for number, migration in job.migrations.items():
        taken = {m.data_ptr() for held in job.workers[number].held for m in held.memory.values()}
        for shard in [*migration.state.owned, *migration.state.kept]:
            for name, memory in shard.memory.items():
                if memory.data_ptr() not in taken and name != PARAM:
                    memory.fill_(7.0)
    assert {number: worker.contents() for number, worker in job.workers.items()} == before


# Refusals


def damage(worker: Worker, kind: MessageKind, change: Callable[[np.ndarray], object]) -> None:
    """The first message of this kind is changed on its way."""
    send = worker.network.send
    first = iter([True])

    def damaged(peer: int, tag: Any, *buffers: Any) -> None:
        if tag.kind == kind and next(first, False):
            copy = np.frombuffer(bytearray(buffers[0]), dtype=np.uint8)
            change(copy)
            buffers = (copy,)
        send(peer, tag, *buffers)

    worker.network.send = damaged  # pyright: ignore[reportAttributeAccessIssue]


def refused(job: Job, proposal: Proposal) -> str:
    with pytest.raises(GateRefused) as caught:
        job.migrate(proposal)
    return caught.value.check


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (MessageKind.TRANSFER, lambda message: message[1000:1001].__ixor__(1)),
        (MessageKind.TRANSFER, lambda message: message[:8192].__setitem__(slice(None), np.roll(message[:8192], 4096))),
        (MessageKind.TRANSFER_DIGEST, lambda message: message[3:4].__ixor__(1)),
    ],
)
def test_contents_that_differ_from_what_was_sent_are_refused(make: Make, kind: MessageKind, change: Any) -> None:
    job = make("one dies and one joins")
    proposal = job.propose()
    before = {number: worker.contents() for number, worker in job.survivors.items()}
    for worker in job.survivors.values():
        damage(worker, kind, change)
    assert refused(job, proposal) == "contents"
    assert {number: worker.contents() for number, worker in job.survivors.items()} == before


def test_a_run_that_nobody_sends_is_refused(make: Make) -> None:
    job = make("one of three dies")
    proposal = job.propose()
    for left_out in proposal.transfers:
        fewer = dataclasses.replace(proposal, transfers=tuple(move for move in proposal.transfers if move != left_out))
        with pytest.raises(
            GateRefused, match=rf"worker {left_out.destination} has not received {left_out.state} of layer {left_out.layer}"
        ):
            job.migrate(fewer)
        proposal = dataclasses.replace(proposal, view=dataclasses.replace(proposal.view, attempt=proposal.view.attempt + 1))
    job.migrate(proposal)
    job.check(proposal)


def test_a_run_that_its_sender_does_not_hold_is_refused(make: Make) -> None:
    job = make("one of three dies")
    proposal = job.propose()
    move = next(move for move in proposal.transfers if move.state == "exp_avg")
    sender = job.workers[move.source]
    sender.held = [held for held in sender.held if held.layer != move.layer or held.role == "gathered"]
    with pytest.raises(
        GateRefused, match=rf"worker {move.source} must send {move.source}>.*, but does not hold it at step {STEP}"
    ) as caught:
        job.migrate(proposal)
    assert caught.value.check == "coverage"


def test_a_message_of_another_size_is_refused(make: Make) -> None:
    job = make("one of two in a stage dies")
    proposal = job.propose()
    move = proposal.transfers[0]
    sender = job.workers[move.source]
    send = sender.network.send
    sender.network.send = lambda peer, tag, *buffers: send(  # pyright: ignore[reportAttributeAccessIssue]
        peer, tag, *(buffers if tag.kind != MessageKind.TRANSFER else (bytes(100),))
    )
    with pytest.raises(LinkError, match="sent 100 bytes"):
        job.migrate(proposal)


# Before the first step


def test_the_initial_state_of_an_optimizer_does_not_move(make: Make) -> None:
    job = make("one of three dies")
    for worker in job.survivors.values():
        worker.held = [dataclasses.replace(held, step=-1, memory={PARAM: held.memory[PARAM]}) for held in worker.held]
    inventories = {
        number: dataclasses.replace(worker.inventory, yielded=-1, states={}, scalars={}) for number, worker in job.survivors.items()
    }
    for number, worker in job.survivors.items():
        worker.__class__ = type("Initial", (Worker,), {"inventory": inventories[number]})
    proposal = job.propose()
    assert (proposal.resume, proposal.states, proposal.scalars) == (-1, {}, {})
    assert {move.state for move in proposal.transfers} <= {PARAM}
    job.migrate(proposal)
    for number, worker in job.survivors.items():
        state = job.migrations[number].state
        assert state.step == -1
        assert all(shard.memory.keys() == {PARAM} for shard in [*state.owned, *state.kept])
        assert set(worker.model.flats) == set(proposal.view.layout.layers_of(number))


def test_links_are_counted_once_per_pair() -> None:
    after = view((0, 1, 2), 1)
    found = [links(worker, frozenset({0, 1, 2, 9} - {worker}), frozenset({0, 1, 2} - {worker}), after) for worker in (0, 1, 2)]
    assert {name: sum(one[name] for one in found) for name in ("kept", "dropped", "made")} == {"kept": 3, "dropped": 3, "made": 0}
    assert links(0, frozenset(), frozenset({1, 2}), after) == {"kept": 0, "dropped": 0, "made": 2}


def test_padding_stays_zero(make: Make) -> None:
    job = make("one joins the only one")
    job.migrate(job.propose())
    for worker in job.workers.values():
        for layer, flat in worker.model.flats.items():
            mask = torch.ones(SPEC.layers[layer].size, dtype=torch.bool)
            for parameter in SPEC.layers[layer].parameters:
                mask[parameter.start : parameter.stop] = False
            assert not flat[mask].any()


def test_peers_are_those_that_state_moves_between(make: Make) -> None:
    job = make("other stages")
    proposal = job.propose()
    job.prepare(proposal)
    for number, migration in job.migrations.items():
        assert isinstance(migration, Migration)
        pairs = {(move.source, move.destination) for move in proposal.transfers}
        assert migration.peers == {a if b == number else b for a, b in pairs if number in (a, b)}
    assert {move.state for move in proposal.transfers} <= {PARAM, *STATES}
