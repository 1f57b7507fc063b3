"""Values that change after `save` has returned do not reach the disk; there is one buffer, and one save at a time."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from checkpoint.background import AsyncSaver, Snapshot
from checkpoint.commit import save
from checkpoint.directory import newest
from checkpoint.store import LocalStore
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs


def test_what_is_written_is_what_was_when_save_was_called(tmp_path: Path) -> None:
    values = values_at(5)
    store, saver, go = LocalStore(tmp_path), AsyncSaver(), threading.Event()

    def write(runs) -> None:
        go.wait()
        save(store, contents_of(values), runs, step=5)

    assert saver.save("step 5", whole_runs(values), write)
    for tensor in values.values():
        tensor.zero_()
    assert saver.busy
    go.set()
    saver.close()
    source = newest(store, verify=True)
    assert source is not None
    assert equals(source, values_at(5))


def test_a_second_save_is_skipped_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    saver, go = AsyncSaver("skip"), threading.Event()
    assert saver.save("step 1", [], lambda _: go.wait())
    with caplog.at_level(logging.WARNING):
        assert not saver.save("step 2", [], lambda _: None)
    assert "step 2 is skipped" in caplog.text
    go.set()
    saver.wait()
    assert saver.save("step 3", [], lambda _: None)
    saver.wait()


def test_a_second_save_waits_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    saver, go, done = AsyncSaver(), threading.Event(), []
    saver.save("step 1", [], lambda _: (go.wait(), done.append(1)))
    threading.Timer(0.02, go.set).start()
    with caplog.at_level(logging.WARNING):
        assert saver.save("step 2", [], lambda _: done.append(2))
    assert "step 2 waits" in caplog.text
    saver.wait()
    assert done == [1, 2]


def test_errors_reach_the_caller_once() -> None:
    saver = AsyncSaver()

    def write(_runs) -> None:
        raise CheckpointError("disk full")

    saver.save("step 1", [], write)
    with pytest.raises(CheckpointError, match="disk full"):
        saver.save("step 2", [], write)
    saver.wait()

    saver.save("step 3", [], lambda _: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        saver.wait()


def test_one_buffer_is_used_again() -> None:
    snapshot = Snapshot()
    first = snapshot.take(whole_runs(values_at(1)))
    pointers = [tensor.data_ptr() for *_, tensor in first]
    size = snapshot.nbytes
    second = snapshot.take(whole_runs(values_at(2)))
    assert [tensor.data_ptr() for *_, tensor in second] == pointers
    assert snapshot.nbytes == size
    for (*_, tensor), (*_, wanted) in zip(second, whole_runs(values_at(2)), strict=True):
        assert torch.equal(tensor, wanted)
        assert tensor.data_ptr() % 64 == 0 or not tensor.numel()
