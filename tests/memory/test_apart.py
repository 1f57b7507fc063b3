"""Tests replicas, migrations and checkpoints if tensors and host bytes do not share memory, as on another device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic.checkpoint.commit import save
from elastic.checkpoint.directory import newest
from elastic.checkpoint.slices import Slicing
from elastic.checkpoint.state import PARAM
from elastic.checkpoint.store import LocalStore
from elastic.memory.tensors import Landing
from tests.apart import landings, put_apart
from tests.checkpoint.format_samples import contents_of, values_at, whole_runs
from tests.recovery.migrating import Job, view
from tests.snapshot.replicating import OPTIMIZERS, Pair, copied, equal


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    put_apart(monkeypatch)


def test_the_bytes_are_apart() -> None:
    tensor = torch.zeros(2)
    landing = Landing(tensor)
    landing.bytes[:] = 0
    landing.bytes[3] = 0x40
    assert tensor.tolist() == [0.0, 0.0]
    assert landing.take().tolist() == [2.0, 0.0]


def test_replicas_have_the_bits_of_their_owners() -> None:
    pair = Pair(OPTIMIZERS["adamw"])
    for step in range(3):
        pair.step(step, absent=step == 1)
    owned = {**copied(pair.workers[0].shards), **copied(pair.workers[1].shards)}
    for worker in pair.workers:
        worker.replicator.replay(2)
        assert worker.replicator.replicas
        for replica in worker.replicator.replicas:
            assert equal(replica.shard.memory, owned[replica.shard.layer, replica.shard.interval.start])
    pair.close()
    assert landings


@pytest.mark.parametrize("change", [((0, 1, 2), 3, {"lost": [1], "stages": 2}), ((0, 1), 1, {"joined": [2, 4], "stages": 1})])
def test_state_moves(change: tuple[tuple[int, ...], int, dict]) -> None:
    workers, stages, then = change
    job = Job(view(workers, stages), **then)
    proposal = job.propose()
    job.migrate(proposal)
    job.check(proposal)
    job.close()
    assert landings


def test_a_checkpoint_is_read_to_where_it_is_wanted(tmp_path: Path) -> None:
    values = values_at(7, {"a": (300, 401), "b": (65,)})
    slicing = {("a", PARAM): Slicing(dim=1, widths=((200, 201),))}
    save(LocalStore(tmp_path), contents_of(values), whole_runs(values), step=7, slicings=slicing)
    source = newest(LocalStore(tmp_path))
    assert source is not None
    for (name, state), whole in values.items():
        found = torch.zeros(whole.numel() - 3, dtype=whole.dtype)
        source.read_into(name, state, 3, found)
        assert torch.equal(found, whole.reshape(-1)[3:])
    source.close()
    assert landings
