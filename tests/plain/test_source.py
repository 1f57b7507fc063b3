"""Tests what becomes of the data that a plain loop is given, and how long its passes are."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from elastic.engine.data import tokens_in
from elastic.worker.loading.ahead import LoaderSettings
from elastic.worker.loading.given import Given
from elastic.worker.loading.given import given as given_data
from elastic.worker.plain.loader import Loader
from elastic.worker.plain.loop import Place
from elastic.worker.plain.passes import Passes
from elastic.worker.plain.prepare import _ends
from elastic.worker.plain.source import Stream, stream_of
from tests.plain import loops

ROWS = loops.Rows()


class Numbers(torch.utils.data.Dataset[Any]):
    def __init__(self, size: int = 40) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def indices(shuffle: bool, steps: int) -> list[int]:
    what = given_data(DataLoader(Numbers(), batch_size=8, shuffle=shuffle), None, None)
    stream = stream_of(what, 4, 1)
    return [int(i) for step in range(steps) for micro_batch in range(2) for i in stream.load(step, micro_batch)]


def test_a_loader_gives_its_dataset_sizes_and_order() -> None:
    join = lambda samples: torch.stack(samples) + 1  # noqa: E731
    what = given_data(DataLoader(Numbers(), batch_size=8, shuffle=True, collate_fn=join), None, None)
    assert (what.batch_size, what.shuffles, what.collate) == (8, True, join)
    assert given_data(DataLoader(Numbers(), batch_size=8), 16, None).batch_size == 16
    assert indices(False, 5) == list(range(40))
    assert sorted(indices(True, 5)) == list(range(40)) != indices(True, 5)
    assert indices(False, 6)[-8:] == list(range(8))


def test_processes_of_a_loader_are_said_to_be_unused_for_iterable_data(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert given_data(DataLoader(loops.Stream(), num_workers=2), None, None).processes is None
    assert "num_workers=2 is not used: each worker reads all" in caplog.text


def test_a_loader_says_what_its_processes_are() -> None:
    found = given_data(DataLoader(Numbers(), num_workers=2, prefetch_factor=3, timeout=5), None, None).processes
    assert found == LoaderSettings(processes=2, prefetch=3, init=None, timeout_s=5)
    found = given_data(DataLoader(Numbers(), num_workers=1, worker_init_fn=print), None, None).processes
    assert found == LoaderSettings(processes=1, prefetch=2, init=print, timeout_s=0)
    assert given_data(DataLoader(Numbers()), None, None).processes is None


def test_a_micro_batch_is_found_by_its_key_once_and_counts_its_tokens() -> None:
    stream = Stream(lambda step, micro_batch: {"input_ids": torch.full((2, 5), step), "text": ["a", "b"]})
    keyed = stream(3, 1)
    stream(3, 2)
    assert keyed[0].tolist() == [3, 1]
    assert tokens_in(keyed) == 10
    assert stream.taken(3, 1)["text"] == ["a", "b"]
    with pytest.raises(KeyError):
        stream.taken(3, 1)
    stream(4, 0)
    with pytest.raises(KeyError):  # of a step that was given up
        stream.taken(3, 2)


def test_tensors_are_contiguous_and_aligned() -> None:
    memory = torch.arange(64.0)
    found = Stream(lambda step, micro_batch: [memory[1:9], memory.view(8, 8).t()]).load(0, 0)
    assert all(tensor.data_ptr() % 64 == 0 and tensor.is_contiguous() for tensor in found)
    assert torch.equal(found[1], memory.view(8, 8).t())


@given(samples=st.integers(1, 200), batch=st.integers(1, 50), epochs=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_passes_take_each_sample_once_an_epoch_up_to_a_batch(samples: int, batch: int, epochs: int) -> None:
    what = Given(data=Numbers(samples), batch_size=batch, collate=None, shuffles=True)
    stream: Any = stream_of(what, 1, 0)
    end_of = _ends(what, stream, None, epochs)
    ends = [end_of(number) for number in range(5)]
    assert all(0 <= (number + 1) * epochs * samples - end * batch < batch for number, end in enumerate(ends))
    assert all(later >= end for end, later in itertools.pairwise(ends))
    assert _ends(what, stream, 7, None)(3) == 7


def loader_of(loop: Any, passes: Passes | None = None, data: Any = ROWS) -> Loader:
    """With epochs of 10 steps."""
    return Loader(loop, passes or Passes(lambda number: 10 * (number + 1), whole=True), data, batch_size=8, saves=False)


@pytest.mark.parametrize(
    ("taken", "stopped", "numbers"),
    [([0, 10, 20, 30], False, [0, 1, 2]), ([0, 25, 30], False, [0, 2]), ([0, 30], False, [0]), ([0, 10], True, [0])],
)
def test_epochs_that_are_over_are_left_out(taken: list[int], stopped: bool, numbers: list[int]) -> None:
    """`taken`: steps before the first loop, and after each."""
    loop: Any = SimpleNamespace(taken=taken[0], stopped=False, resumed_at=None, place=Place.OUTSIDE, built=False)
    loader, found = loader_of(loop), []
    for number, after in zip(loader.epochs(3), taken[1:], strict=False):
        found.append((number, len(loader)))
        loop.taken, loop.stopped, loop.built = after, stopped, True
    assert found == [(number, 10) for number in numbers]


def test_an_epoch_whose_end_a_checkpoint_is_of_is_gone_on_with_behind_its_loop() -> None:
    loop: Any = SimpleNamespace(taken=0, stopped=False, resumed_at=None, built=False)
    found = []
    for number in loader_of(loop).epochs(4):
        found.append(number)
        loop.built, loop.taken = True, 20
        loop.resumed_at = 20
        if number > 1:
            loop.taken = 10 * (number + 1)
    assert found == [0, 1, 2, 3]
