"""Tests that the previous copy equals the state after the previous step, reuses its memory, and is kept while a save reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.snapshot.replicating import OPTIMIZERS, Pair, Worker, copied, equal


@pytest.fixture(params=["adamw", "adagrad"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    pair = Pair(OPTIMIZERS[request.param])
    yield pair.workers[0]
    pair.close()


def test_it_is_the_step_before(worker: Worker) -> None:
    for step in range(3):
        before = copied(worker.shards)
        scalars = {(s.layer, s.interval.start): worker.optimizer.owned.scalars(s) for s in worker.shards}
        worker.update(step)
        assert not all(equal(before[s.layer, s.interval.start], s.memory) for s in worker.shards), "nothing was updated"
        assert len(worker.previous_copies.held) == len(worker.shards)
        for previous in worker.previous_copies.held:
            assert (previous.step, previous.role) == (step - 1, "previous")
            assert equal(previous.memory, before[previous.layer, previous.start])
            assert previous.scalars == scalars[previous.layer, previous.start]


def test_its_memory_is_used_again_and_never_the_owners(worker: Worker) -> None:
    worker.update(0)
    worker.update(1)
    first = {(h.layer, h.start, name): memory.data_ptr() for h in worker.previous_copies.held for name, memory in h.memory.items()}
    worker.update(2)
    second = {(h.layer, h.start, name): memory.data_ptr() for h in worker.previous_copies.held for name, memory in h.memory.items()}
    assert first == second
    owned = {memory.data_ptr() for shard in worker.shards for memory in shard.memory.values()}
    assert owned.isdisjoint(second.values())


def test_what_is_lent_stays_as_it_is(worker: Worker) -> None:
    worker.update(0)
    worker.previous_copies.take(0)  # earlier than its update
    lent = {(h.layer, h.start): h.memory for h in worker.previous_copies.held}
    before = {key: {name: values.clone() for name, values in memory.items()} for key, memory in lent.items()}
    give_back = worker.previous_copies.lend()
    for step in (1, 2, 3):
        worker.update(step)
        assert all(equal(lent[key], before[key]) for key in lent)
        assert {h.step for h in worker.previous_copies.held} == {step - 1}
    one = worker.previous_copies.bytes // 2
    give_back()
    worker.previous_copies.take(3)
    give_back = worker.previous_copies.lend()
    worker.update(4)
    worker.update(5)
    pointers = {h.memory["param"].data_ptr() for h in worker.previous_copies.held}
    assert pointers == {memory["param"].data_ptr() for memory in lent.values()}, "the memory that is back is used"
    give_back()
    for step in (6, 7):
        worker.update(step)
    assert worker.previous_copies.bytes == 2 * one


def test_what_is_back_before_the_next_step_needs_no_second_buffer(worker: Worker) -> None:
    worker.update(0)
    worker.previous_copies.take(0)
    whole = worker.previous_copies.bytes
    worker.previous_copies.lend()()
    worker.update(1)
    worker.update(2)
    assert worker.previous_copies.bytes == whole


def test_what_is_kept_stays_as_it_is_until_another_one_is(worker: Worker) -> None:
    worker.update(0)
    worker.update(1)
    previous = worker.previous_copies
    whole, kept = previous.bytes, [*previous.held]
    before = [{name: values.clone() for name, values in held.memory.items()} for held in kept]
    previous.keep([replace(held, digest=f"digest of {held.start}") for held in kept])
    for step in (2, 3, 4):
        worker.update(step)
        assert all(equal(held.memory, values) for held, values in zip(previous.kept, before, strict=True))
        assert {(held.role, held.step) for held in previous.kept} == {("kept", 0)}
        assert {held.step for held in previous.held} == {step - 1}
    assert [held.digest for held in previous.kept] == [f"digest of {held.start}" for held in kept]
    assert [held.scalars for held in previous.kept] == [held.scalars for held in kept]
    assert previous.bytes == 2 * whole
    previous.keep(previous.held)
    worker.update(5)
    pointers = {memory.data_ptr() for held in previous.held for memory in held.memory.values()}
    assert pointers == {memory.data_ptr() for held in kept for memory in held.memory.values()}, "the memory of the one before is used"
    assert {held.step for held in previous.kept} == {3}
    assert previous.bytes == 2 * whole


def test_what_is_lent_and_kept_is_not_written_to(worker: Worker) -> None:
    worker.update(0)
    worker.previous_copies.take(0)
    previous = worker.previous_copies
    before = [{name: values.clone() for name, values in held.memory.items()} for held in previous.held]
    give_back = previous.lend()
    worker.update(1)
    previous.keep(previous.held)
    for step in (2, 3):
        worker.update(step)
        give_back()
        assert all(equal(held.memory, values) for held, values in zip(previous.kept, before, strict=True))
    assert {held.step for held in previous.kept} == {0}
