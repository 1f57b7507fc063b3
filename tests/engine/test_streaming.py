"""Tests micro-batches of data that can only be read in order."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import harness
import models
import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, default_collate

import elastic
from elastic.engine.data import batches, stream_in
from elastic.engine.streaming import Position, StreamBatches
from elastic.errors import TrainerError

SIZES: dict[str, Any] = {"batch_size": 6, "micro_batch_size": 2, "seed": 1}


class Numbers(IterableDataset[Any]):
    """Counts to `count` in each pass; counts reads."""

    def __init__(self, count: int = 10) -> None:
        self.count, self.reads, self.epochs = count, 0, []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            self.reads += 1
            yield {"number": number, "noise": torch.rand(1), "list": [number]}


def first_samples(batch: Any) -> str | None:
    found = stream_in(batch)
    return None if found is None else found.digest()


def numbers(found: Any) -> list[int]:
    return found["number"].tolist()


def test_steps_follow_each_other_over_passes():
    data = Numbers(10)
    load = batches(data, collate=None, **SIZES)
    assert [numbers(load(step, m)) for step in range(2) for m in range(3)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]
    assert data.epochs == [0, 1]
    assert data.reads == 12


def test_a_step_is_read_again_from_memory_and_an_older_one_from_the_beginning():
    data = Numbers(100)
    load = batches(data, collate=None, **SIZES)
    found = [load(step, 2) for step in range(5)]
    assert data.reads == 30
    again = load(3, 0)
    assert numbers(again) == [18, 19]
    assert data.reads == 30
    assert numbers(load(3, 2)) == numbers(found[3])
    assert numbers(load(0, 2)) == [4, 5]
    assert data.reads == 36
    for step in range(5):
        assert torch.equal(load(step, 2)["noise"], found[step]["noise"])  # keyed by the sample


def test_what_collate_changes_is_not_changed_for_the_next_time():
    def collate(samples: list[dict[str, Any]]) -> list[int]:
        return [sample["list"].pop() for sample in samples]

    load = batches(Numbers(), collate=collate, **SIZES)
    assert load(0, 1) == load(0, 1) == [2, 3]


def test_another_worker_finds_the_same_micro_batch():
    one, other = (batches(Numbers(7), collate=None, **SIZES) for _ in range(2))
    for step in range(4):
        one(step, 0)
    assert numbers(other(4, 1)) == numbers(one(4, 1))
    assert torch.equal(other(4, 1)["noise"], one(4, 1)["noise"])


class Shuffled(IterableDataset[Any]):
    """Shuffles by a generator of its own."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def __iter__(self) -> Iterator[Any]:
        rows = list(range(40))
        random.Random(self.seed).shuffle(rows)
        yield from ({"row": np.array(row), "text": str(row), "more": (row, None, 1.5)} for row in rows)


def test_data_that_is_not_the_same_again_is_refused():
    assert first_samples(batches(Shuffled(3), collate=None, **SIZES)) == first_samples(batches(Shuffled(3), collate=None, **SIZES))
    assert first_samples(batches(Shuffled(3), collate=None, **SIZES)) != first_samples(batches(Shuffled(4), collate=None, **SIZES))
    with pytest.raises(TrainerError, match=r"Shuffled gives other samples when it is read a second time.*fixed seed"):
        first_samples(batches(Shuffled(None), collate=None, **SIZES))
    assert first_samples(batches([1, 2], collate=None, **SIZES)) is None
    with pytest.raises(TrainerError, match=r"a generator can be read only once"):
        batches((row for row in [1]), collate=None, **SIZES)
    with pytest.raises(TrainerError, match=r"the Numbers gave no sample in pass 0: it is empty"):
        batches(Numbers(0), collate=None, **SIZES)(0, 0)


def test_streams_of_hugging_face():
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    data = datasets.Dataset.from_dict({"number": list(range(20))}).to_iterable_dataset(num_shards=2).shuffle(seed=5, buffer_size=4)
    load = batches(data, collate=lambda rows: [row["number"] for row in rows], **SIZES)
    assert first_samples(load)
    first = [load(step, m) for step in range(6) for m in range(3)]
    assert sorted(number for each in first[:10] for number in each) == list(range(20))
    assert first[10:] != first[:8]  # another pass has another order
    other = batches(data, collate=lambda rows: [row["number"] for row in rows], **SIZES)
    assert other(5, 2) == first[17]


class Resumable(Numbers):
    """Continues behind the last number that it gave."""

    def __init__(self, count: int = 10, *, forgets: bool = False) -> None:
        super().__init__(count)
        self.begins, self.next, self.forgets = 0, 0, forgets

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next - self.forgets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begins = state["next"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first, self.begins = self.begins, 0
        for number in range(first, self.count):
            self.reads += 1
            self.next = number + 1
            yield {"number": number, "noise": torch.rand(1)}


def positions(data: Any) -> tuple[Any, Position, list[int]]:
    load, step = batches(data, collate=None, **SIZES), [0]
    assert isinstance(load, StreamBatches)
    return load, Position(load, lambda: step[0]), step


def test_a_state_leads_to_the_step_without_reading_what_was_before():
    one, place, step = positions(Resumable(10))
    wanted = [[one(number, m) for m in range(3)] for number in range(6)]
    for number in range(7):
        other, there, _ = positions(Resumable(10))
        one, place, step = positions(Resumable(10))
        for earlier in range(number):
            one(earlier, 0)
        step[0] = number
        there.load_state_dict(place.state_dict())
        assert other._dataset.reads == (1 if number else 0)
        for later in range(number, 6):
            for m in range(3):
                found = other(later, m)
                assert numbers(found) == numbers(wanted[later][m])
                assert torch.equal(found["noise"], wanted[later][m]["noise"])
        if number > 1:
            assert numbers(other(0, 1)) == [2, 3]


def test_a_state_that_forgets_something_is_not_used(caplog: pytest.LogCaptureFixture):
    one, place, step = positions(Resumable(100, forgets=True))
    one(2, 0)
    step[0] = 3
    other, there, _ = positions(data := Resumable(100, forgets=True))
    there.load_state_dict(place.state_dict())
    assert "the state of the Resumable does not lead to the sample that follows; it is read from the beginning" in caplog.text
    assert numbers(other(3, 0)) == [18, 19]
    assert data.reads > 18


def test_states_of_hugging_face():
    datasets = pytest.importorskip("datasets", reason="needs datasets")

    def made(buffer: int) -> Any:
        data = datasets.Dataset.from_dict({"number": list(range(60))}).to_iterable_dataset(num_shards=3)
        return data.shuffle(seed=5, buffer_size=buffer) if buffer else data

    for buffer in (0, 8):
        one, place, step = positions(made(buffer))
        wanted = [numbers(one(number, 1)) for number in range(14)]
        for number in (0, 1, 4, 10, 12):
            one, place, step = positions(made(buffer))
            step[0] = number
            other, there, _ = positions(made(buffer))
            there.load_state_dict(place.state_dict())
            assert [numbers(other(later, 1)) for later in range(number, 14)] == wanted[number:]


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (models.Rows()[index] for index in range(50))


def train(job: Any, unlike: bool) -> tuple[str, list[float]]:
    data = Shuffled(job.worker) if unlike else Rows()
    model = [torch.nn.Linear(48, 48), models.Head()]
    trainer = elastic.Trainer(model, models.cross_entropy, models.adamw, data, batch_size=24, micro_batch_size=4, collate=default_collate)
    losses = [report.loss for report in trainer.run(4)]
    return trainer.digest(), losses


@pytest.mark.slow
def test_a_stream_gives_the_same_steps_on_every_layout():
    alone = harness.run(train, workers=1, args=(False,))
    for workers, stages in ((2, 1), (2, 2)):
        assert harness.run(train, workers=workers, stages=stages, args=(False,)) == alone * workers
