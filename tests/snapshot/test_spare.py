"""The spare is the step before, bit for bit, in memory that is used again."""

from __future__ import annotations

from collections.abc import Iterator

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
        assert len(worker.spares.held) == len(worker.shards)
        for spare in worker.spares.held:
            assert (spare.step, spare.role) == (step - 1, "spare")
            assert equal(spare.memory, before[spare.layer, spare.start])
            assert spare.scalars == scalars[spare.layer, spare.start]


def test_its_memory_is_used_again_and_never_the_owners(worker: Worker) -> None:
    worker.update(0)
    worker.update(1)
    first = {(h.layer, h.start, name): memory.data_ptr() for h in worker.spares.held for name, memory in h.memory.items()}
    worker.update(2)
    second = {(h.layer, h.start, name): memory.data_ptr() for h in worker.spares.held for name, memory in h.memory.items()}
    assert first == second
    owned = {memory.data_ptr() for shard in worker.shards for memory in shard.memory.values()}
    assert owned.isdisjoint(second.values())
