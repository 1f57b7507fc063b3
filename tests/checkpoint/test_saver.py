"""Tests saves by several members in threads: the coordinator commits after all receipts, and aborted saves leave nothing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic.checkpoint import commit
from elastic.checkpoint import saver as saving
from elastic.checkpoint.commit import join, save
from elastic.checkpoint.directory import collect, found, newest
from elastic.checkpoint.objects import ObjectStore
from elastic.checkpoint.plan import plan_files
from elastic.checkpoint.saver import Saver, newest_epoch
from elastic.checkpoint.state import Contents
from elastic.checkpoint.store import LocalStore, Store
from elastic.checkpoint.writer import TensorRun
from elastic.errors import CheckpointError
from tests.checkpoint.format_samples import contents_of, equals, values_at, whole_runs

TOKEN = "0123456789abcdef"
SMALL = {"a": (300, 301), "b": (65,)}


def halves(step: int) -> tuple[list[TensorRun], list[TensorRun]]:
    """Returns the values that each of two members owns at a step."""
    parts: tuple[list[TensorRun], list[TensorRun]] = ([], [])
    for number, (name, state, _, tensor) in enumerate(whole_runs(values_at(step, SMALL))):
        flat = tensor.reshape(-1)
        cut = flat.numel() * (number + 1) // 9
        parts[0].append((name, state, 0, flat[:cut]))
        parts[1].append((name, state, cut, flat[cut:]))
    return parts


def begin(
    saver: Saver,
    step: int,
    contents: Contents,
    runs: list[TensorRun],
    *,
    token: str = TOKEN,
    members: tuple[int, ...] = (0, 1),
    release: Callable[[], None] = lambda: None,
) -> None:
    saver.start(lambda: (contents, runs), step=step, epoch=1, token=token, members=members, release=release)


def start(savers: list[Saver], step: int, release: Callable[[], None] = lambda: None) -> None:
    for number, (saver, own) in enumerate(zip(savers, halves(step), strict=False)):
        contents = contents_of(values_at(step, SMALL), step)
        known = {name: values for place, (name, values) in enumerate(contents.scalars.items()) if place % 2 == number}
        assert known
        begin(saver, step, replace(contents, scalars=known), own, release=release)


def told(savers: list[Saver]) -> dict[int, Any]:
    assert all(saver.wait() for saver in savers)
    return {worker: receipt for worker, saver in enumerate(savers) if (receipt := saver.receipt()) is not None}


@pytest.mark.parametrize("objects", [False, True])
def test_two_members_make_a_checkpoint(tmp_path: Path, objects: bool) -> None:
    retained: list[Store] = []
    store = ObjectStore(f"local://{tmp_path}") if objects else LocalStore(tmp_path)
    savers = [Saver(store, 0, retain=retained.append), Saver(store, 1)]
    released: list[int] = []
    start(savers, 3, lambda: released.append(1))
    assert savers[0].busy
    receipts = told(savers)
    assert released == [1, 1]
    assert not savers[1].busy
    assert savers[0].receipt() is None
    savers[0].take({1: receipts[1]}, (0, 1))
    assert savers[0].busy
    savers[0].take({0: receipts[0]}, (0, 1))
    savers[0].finish()
    assert not savers[0].busy
    assert retained == [store]
    source = newest(store, verify=True)
    assert source is not None
    assert equals(source, values_at(3, SMALL))
    assert newest_epoch(store) == 1


def test_a_save_whose_members_changed_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    savers = [Saver(LocalStore(tmp_path), worker) for worker in (0, 1)]
    start(savers, 3)
    receipts = told(savers)
    savers[0].take(receipts, (0, 2))
    assert savers[0].busy
    with caplog.at_level(logging.WARNING):
        savers[0].drop()
    savers[0].finish()
    assert "the state after 3 steps is not saved: the members changed" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["waiting", "writing", "told"])
def test_the_first_that_is_left_removes_what_a_dead_coordinator_began(tmp_path: Path, when: str) -> None:
    """Before all files are there, while it writes itself, or when its receipt is on the way. What another job saves stays."""
    store, values = LocalStore(tmp_path), values_at(3, SMALL)
    stranger = Saver(store, 4)
    begin(stranger, 3, contents_of(values, 3), whole_runs(values), token="another", members=(4,))
    assert stranger.wait(5)
    theirs = {path.name for path in tmp_path.iterdir()}
    began, go = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        go.wait(5)

    savers = [Saver(store, worker) for worker in (0, 1, 2)]
    if when == "waiting":
        ticket = commit.begin(store, plan_files(contents_of(values, 3)), step=3, epoch=1, token=TOKEN)
        next((tmp_path / ticket.directory).glob("model-*.safetensors")).unlink()
    for saver, runs in zip(savers, (*halves(3), []), strict=True):
        if when != "waiting" or saver is not savers[0]:
            release = slow if when == "writing" and saver is savers[1] else go.is_set
            begin(saver, 3, contents_of(values, 3), runs, members=(0, 1, 2), release=release)
    if when == "told":
        assert len(told(savers)) == 3
        assert not savers[1].busy
    elif when == "writing":
        assert began.wait(5)
        assert savers[0].wait(5)
    else:
        assert not savers[1].wait(0.1)
    assert len({path.name for path in tmp_path.iterdir()} - theirs) == 1
    threads = [thread for thread in threading.enumerate() if thread.name == "checkpoint-save"]
    for saver in savers[1:]:
        saver.drop(left=(1, 2, 5))
    go.set()
    for thread in threads:
        thread.join()
    for saver in savers[1:]:
        saver.finish()
    assert {path.name for path in tmp_path.iterdir()} == theirs


def test_what_a_coordinator_has_committed_is_not_removed_when_it_dies(tmp_path: Path) -> None:
    savers = [Saver(LocalStore(tmp_path), worker) for worker in (0, 1)]
    start(savers, 3)
    savers[0].take(told(savers), (0, 1))
    savers[0].finish()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert before == ["latest", "step-00000003"]
    savers[1].drop(left=(1,))
    savers[1].finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert newest(LocalStore(tmp_path), verify=True) is not None


def test_a_member_that_cannot_write_ends_the_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    savers = [Saver(LocalStore(tmp_path), worker) for worker in (0, 1)]
    first, second = halves(3)
    contents = contents_of(values_at(3, SMALL), 3)
    begin(savers[0], 3, contents, first)
    begin(savers[1], 3, contents, [*second, ("unknown", "param", 0, second[0][3])])
    with caplog.at_level(logging.WARNING):
        savers[0].take(told(savers), (0, 1))
        savers[0].finish()
    assert "the state after 3 steps is not saved: 'unknown', 'param' is not in the plan of files" in caplog.text
    assert "the state after 3 steps is not saved: worker 1 could not write its part" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_member_without_memory_ends_the_save_and_not_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def exhausted() -> tuple[Contents, list[TensorRun]]:
        raise MemoryError("no room")

    saver, released = Saver(LocalStore(tmp_path), 0), []
    saver.start(exhausted, step=3, epoch=1, token="3", members=(0,), release=lambda: released.append(1))
    receipts = told([saver])
    assert receipts[0]["receipt"] is None
    assert released == [1]
    assert "the state after 3 steps is not saved" in caplog.text
    assert "MemoryError: no room" in caplog.text
    saver.take(receipts, (0,))
    assert not saver.busy
    begin(saver, 4, contents_of(values_at(4, SMALL), 4), whole_runs(values_at(4, SMALL)), members=(0,))
    saver.take(told([saver]), (0,))
    saver.finish()
    assert saver.saved == 4


def test_whoever_waits_for_parts_hears_that_the_save_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    joining = threading.Event()

    def joins(*arguments: Any) -> bool:
        joining.set()
        return join(*arguments)

    monkeypatch.setattr(saving, "join", joins)
    store = ObjectStore(f"local://{tmp_path}")
    savers = [Saver(store, worker) for worker in (0, 1)]
    first, second = halves(3)
    contents = contents_of(values_at(3, SMALL), 3)
    with caplog.at_level(logging.WARNING):
        begin(savers[0], 3, contents, [*first, ("unknown", "param", 0, first[0][3])])
        begin(savers[1], 3, contents, second)
        assert savers[0].wait(5)
        assert joining.wait(5)
        assert not savers[1].wait(0.01), "it waits for the parts of the other one"
        receipt = savers[0].receipt()
        assert receipt is not None
        savers[0].take({0: receipt}, (0, 1))
        assert savers[1].wait(5)
    assert "the state after 3 steps is not saved: worker 0 could not write its part" in caplog.text
    assert collect(store, older_than_s=0, now=time.time() + 60) or list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_whoever_waits_for_the_coordinators_directory_can_be_told_to_stop(tmp_path: Path) -> None:
    saver = Saver(LocalStore(tmp_path), 1)
    released = threading.Event()
    begin(saver, 3, contents_of(values_at(3, SMALL), 3), halves(3)[1], release=released.set)
    assert not saver.wait(0.01)
    saver.drop()
    assert released.wait(5)
    assert not saver.busy


def test_a_coordinator_that_is_slow_at_its_storage_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_PATIENCE_S", 0.02)
    patient, go_on = threading.Event(), threading.Event()

    class Slow(LocalStore):
        def create(self, path: str, size: int) -> None:
            assert go_on.wait(5)
            super().create(path, size)

    class Watched(LocalStore):
        def names(self, path: str) -> list[str]:
            patient.set()
            return super().names(path)

    first, second = halves(3)
    contents = contents_of(values_at(3, SMALL), 3)
    savers = [Saver(Slow(tmp_path), 0), Saver(Watched(tmp_path), 1)]
    begin(savers[0], 3, contents, first)
    while not list(tmp_path.iterdir()):
        time.sleep(0.001)
    begin(savers[1], 3, contents, second)
    assert patient.wait(5), "it has waited as long as for a directory that is not shared"
    assert not savers[1].wait(0.01)
    go_on.set()
    assert all(saver.wait(5) for saver in savers)
    receipts = {worker: receipt for worker in (0, 1) if (receipt := savers[worker].receipt()) is not None}
    savers[0].take(receipts, (0, 1))
    savers[0].finish()
    assert savers[0].saved == 3
    assert "did not appear" not in caplog.text


def test_a_save_that_is_given_up_while_it_writes_removes_its_directory(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, contents_of(values_at(1, SMALL)), whole_runs(values_at(1, SMALL)), step=1)
    saver = Saver(store, 0)
    began, go = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        go.wait()

    begin(saver, 3, contents_of(values_at(3, SMALL), 3), halves(3)[0], release=slow)
    assert began.wait(5)
    saver.drop()
    thread = next(thread for thread in threading.enumerate() if thread.name == "checkpoint-save")
    go.set()
    thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def test_what_retention_cannot_remove_does_not_unmake_the_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_store: Store) -> None:
        raise CheckpointError("read-only")

    saver = Saver(LocalStore(tmp_path), 0, retain=refuse)
    values = values_at(3, SMALL)
    begin(saver, 3, contents_of(values, 3), whole_runs(values), members=(0,))
    with caplog.at_level(logging.WARNING):
        saver.take(told([saver]), (0,))
        saver.finish()
    assert "the state after 3 steps is saved, but older checkpoints were not removed: read-only" in caplog.text
    source = newest(LocalStore(tmp_path))
    assert source is not None
    assert source.contents.step == 3


@pytest.mark.parametrize("objects", [False, True])
def test_two_jobs_in_one_place_leave_whole_checkpoints_of_one_or_the_other(tmp_path: Path, objects: bool) -> None:
    """Step by step at the same time; a step that both save is the first one's, or there twice, where nothing can be renamed."""
    where = f"local://{tmp_path}"
    steps = range(1, 7)

    def job(number: int, at_once: threading.Barrier) -> None:
        store = ObjectStore(where) if objects else LocalStore(tmp_path)
        saver = Saver(store, 0)
        for step in steps:
            values = values_at(100 * number + step, SMALL)
            at_once.wait()
            begin(saver, step, contents_of(values, step), whole_runs(values), token=f"{number:016x}", members=(0,))
            saver.take(told([saver]), (0,))
            saver.finish()

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(job, number, barrier) for number in (1, 2)]:
            future.result()
    entries = list(found(ObjectStore(where) if objects else LocalStore(tmp_path)))
    assert {entry.step for entry in entries} == set(steps)
    assert len(entries) == len(steps) * (1 + objects)
    for entry in entries:
        assert entry.source is not None
        entry.source.verify()
        assert equals(entry.source, values_at(100 + entry.step, SMALL)) != equals(entry.source, values_at(200 + entry.step, SMALL))
    assert not list(tmp_path.glob(".tmp-*"))


def test_looks_for_what_others_make_get_rarer():
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    waiting = saving.Backoff(0.005, lambda: now[0], sleep)
    while waiting.seconds < 10:
        waiting.pause()
    assert pauses[:8] == [0.005] * 8
    assert pauses == sorted(pauses)
    assert pauses[-1] == 0.1
    assert len(pauses) < 150  # 2,000 of 5 ms


def test_a_file_that_is_there_is_not_looked_at_again(tmp_path: Path):
    contents = contents_of(values_at(1, SMALL), 1)
    plan = plan_files(contents, 1500)
    looked: list[str] = []

    class Slow(LocalStore):
        """Each file is there at the third look at it."""

        def size(self, path: str) -> int | None:
            looked.append(path)
            return next(file.size for file in plan.files if path.endswith(file.name)) if looked.count(path) == 3 else None

    store = Slow(tmp_path)
    saver = Saver(store, 1)
    save = saving._Save(key=(1, 1), token=TOKEN, members=(0, 1), layout=None, release=lambda: None)
    saver._await(save, plan, commit.ticket_of(store, plan, step=1, epoch=1, token=TOKEN))
    assert len(looked) == 3 * len(plan.files)
    assert {looked.count(path) for path in looked} == {3}
