"""Runs a part of `crash_matrix.py`, which breaks a save at every call, and checks that it would detect a missing fsync."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from elastic.checkpoint.commit import save
from elastic.checkpoint.store import LocalStore
from elastic.errors import CheckpointError
from tests.checkpoint import crash_matrix as matrix
from tests.checkpoint.format_samples import contents_of, values_at, whole_runs
from tests.checkpoint.recorded_calls import Call, Recorder, in_child, kill


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("crash")
    matrix.prepared(LocalStore(work / "start"))
    return work


@pytest.fixture(scope="module")
def calls(work: Path) -> list[Call]:
    return matrix.calls_of_a_save(work / "start", work / "recorded", matrix.WHOLE)


def test_a_whole_save_is_recorded(calls: list[Call]) -> None:
    kinds = {call.kind for call in calls}
    assert {"mkdir", "posix_fallocate", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir"} <= kinds


@pytest.mark.parametrize("kind", ["mkdir", "posix_fallocate", "pwrite", "fsync", "rename", "replace", "rmdir"])
def test_every_fault_at_one_call_of_each_kind(work: Path, calls: list[Call], kind: str) -> None:
    number = next(number for number, call in enumerate(calls) if call.kind == kind)
    every_fault(work, calls, number, matrix.WHOLE)


def test_every_fault_while_slices_are_written(work: Path) -> None:
    """At the last write of a slice, and at the rename, when all is written, padding included."""
    calls = matrix.calls_of_a_save(work / "start", work / "recorded", matrix.SLICED)
    made = [str(call.arguments[0]) for call in calls if call.kind == "open"]
    assert any("model-tp1-" in name for name in made)
    for kind in ("pwrite", "rename"):
        every_fault(work, calls, max(number for number, call in enumerate(calls) if call.kind == kind), matrix.SLICED)


def every_fault(work: Path, calls: list[Call], number: int, slicings: matrix.Slicings) -> None:
    start, scratch = work / "start", work / "scratch"
    assert matrix.killed(start, scratch, slicings, number, kill) in ("old", "new")
    assert matrix.failed(start, scratch, slicings, number, errno.ENOSPC) in ("old", "new")
    for variant in matrix._VARIANTS:
        assert matrix.power_lost(start, scratch, calls, number, variant) in ("old", "new")


@pytest.mark.parametrize("left_out", ["files", "directories"])
def test_a_save_without_fsync_would_be_noticed(work: Path, calls: list[Call], left_out: str) -> None:
    opened = {}
    kept = []
    for call in calls:
        if call.kind == "open":
            opened[call.result] = bool(call.arguments[1] & os.O_DIRECTORY)
        if call.kind != "fsync" or opened[call.arguments[0]] != (left_out == "directories"):
            kept.append(call)
    results = [matrix.power_lost(work / "start", work / "scratch", kept, len(kept), variant) for variant in matrix._VARIANTS]
    assert any(result.startswith("BAD") for result in results)


def test_the_kill_really_happens(work: Path) -> None:
    assert in_child(lambda: matrix.the_save(LocalStore(work / "start", calls=Recorder(at=0, fault=kill)), matrix.WHOLE)) == -signal.SIGKILL


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path) -> None:
    values = values_at(1, {"a": (1 << 20,)})
    recorder = Recorder()

    def full(call: Call) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = [call.kind for call in _calls_of(values, tmp_path / "trial")].index("posix_fallocate")
    recorder.at, recorder.fault = first, full
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001.safetensors: No space left on device"):
        save(LocalStore(tmp_path, calls=recorder), contents_of(values), whole_runs(values), step=1)
    assert recorder.fired
    assert [path.name for path in tmp_path.iterdir()] == ["trial"]


def _calls_of(values, root: Path) -> list[Call]:
    root.mkdir()
    recorder = Recorder()
    save(LocalStore(root, calls=recorder), contents_of(values), whole_runs(values), step=1, threads=1)
    return recorder.calls


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("not a directory")
    values = values_at(1, {"a": (3,)})
    with pytest.raises(CheckpointError, match="file"):
        save(LocalStore(target), contents_of(values), whole_runs(values), step=1)
    assert target.read_text() == "not a directory"
