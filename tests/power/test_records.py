"""Tests of the records of locked clocks: who owns a GPU, and what a process that was killed has left."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import time

import pytest

from elastic.errors import PowerError
from elastic.launch.run import _restore_clocks
from elastic.power.conditions import Condition
from elastic.power.keeper import Keeper, restore_left
from elastic.power.records import Records, boot_id
from elastic.settings import clocks_directory
from examples.nvml_standin import NOBODY


def refused(call, *arguments) -> PowerError:
    with pytest.raises(PowerError) as caught:
        call(*arguments)
    return caught.value


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "clocks"


@pytest.fixture
def keeper(nvml, directory) -> Keeper:
    return Keeper(nvml, Records(directory), "a")


def test_clocks_are_set_and_restored(keeper, standin, directory):
    first, second = standin.uuids[:2]
    assert keeper.lock(first, 1080) == 1080
    assert keeper.lock(second, 900) == 900
    assert keeper.lock(first, 990) == 990
    record = json.loads((directory / f"{first}.json").read_text())
    assert (record["mhz"], record["job"], record["boot"]) == (990, "a", boot_id())
    keeper.unlock(second)
    assert standin.locked == [990, 0, 0, 0]
    assert keeper.close() == []
    assert standin.locked == [0] * 4
    assert not list(directory.glob("*.json"))


def test_the_record_is_there_before_the_clock_is_locked(keeper, standin, directory, monkeypatch):
    seen = []
    monkeypatch.setattr("elastic.power.nvml.Gpu.lock", lambda gpu, mhz: seen.append((directory / f"{gpu.uuid}.json").exists()))
    keeper.lock(standin.uuids[0], 1080)
    assert seen == [True]


def test_two_jobs_on_one_gpu(keeper, standin, nvml, directory):
    keeper.lock(standin.uuids[0], 1080)
    other = Keeper(nvml, Records(directory), "b")
    error = refused(other.lock, standin.uuids[0], 900)
    assert error.condition == Condition.SHARED.value
    assert "in the hands of job a" in str(error)
    assert other.lock(standin.uuids[1], 900) == 900
    other.close()
    assert standin.locked == [1080, 0, 0, 0]
    keeper.close()
    assert other.lock(standin.uuids[0], 900) == 900
    other.close()


def test_a_gpu_that_other_processes_use_is_left_alone(keeper, standin):
    gpu = standin.gpus[0]
    gpu.process_count, gpu.processes[0], gpu.processes[1] = 2, 111, 222
    error = refused(keeper.lock, standin.uuids[0], 1080, [111])
    assert error.condition == Condition.SHARED.value
    assert "used by other processes too (222)" in str(error)
    assert standin.locked == [0] * 4
    assert keeper.lock(standin.uuids[0], 1080, [111, 222]) == 1080
    keeper.close()


def test_a_clock_that_an_operator_has_locked_is_left_alone(keeper, standin):
    standin.gpus[0].locked_min = standin.gpus[0].locked_max = 1215
    error = refused(keeper.lock, standin.uuids[0], 1080)
    assert error.condition == Condition.SHARED.value
    assert "locked to 1215 MHz by somebody else" in str(error)
    assert keeper.close() == []
    assert standin.locked == [1215, 0, 0, 0]


@pytest.fixture
def waiting(standin, monkeypatch):
    """A GPU that an operator has locked by `nvidia-smi -lgc 135,990`: it says that it is idle between pieces of work. It waits now."""
    standin.gpus[0].locked_min, standin.gpus[0].locked_max = 135, 990
    turns = itertools.cycle([time.monotonic() + 60, 0])
    monkeypatch.setattr("elastic.power.nvml.time.sleep", lambda _: setattr(standin.gpus[0], "busy_until", next(turns)))


@pytest.mark.usefixtures("waiting")
def test_a_range_that_an_operator_has_locked_is_left_alone(keeper, standin):
    keeper.claim(standin.uuids[0])
    assert standin.locked[0] == 990
    error = refused(keeper.lock, standin.uuids[0], 1080)
    assert "locked to 990 MHz by somebody else" in str(error)
    keeper.unlock(standin.uuids[0])
    assert keeper.close() == []
    assert (standin.gpus[0].locked_min, standin.gpus[0].locked_max) == (135, 990)
    assert standin.gpus[0].resets == 0


def test_a_gpu_that_was_refused_is_looked_at_again(keeper, standin):
    gpu = standin.gpus[0]
    gpu.busy_until = time.monotonic() + 60
    gpu.process_count, gpu.processes[0] = 1, 111
    assert "used by other processes" in str(refused(keeper.claim, standin.uuids[0]))
    gpu.process_count, gpu.busy_until, gpu.locked_min, gpu.locked_max = 0, 0, 135, 990  # by an operator, meanwhile
    keeper.claim(standin.uuids[0])
    assert standin.locked[0] == 990
    keeper.close()


def test_a_gpu_that_computes_without_a_lock_is_tried_for_permission(keeper, standin):
    standin.gpus[0].busy_until = time.monotonic() + 60
    keeper.claim(standin.uuids[0])
    assert standin.gpus[0].resets == 1
    standin.gpus[0].may_set = NOBODY
    assert refused(keeper.claim, standin.uuids[0]).condition == Condition.NO_PERMISSION.value
    keeper.close()


def test_without_permission_nothing_is_recorded(keeper, standin, directory):
    standin.gpus[0].may_set = NOBODY
    assert refused(keeper.lock, standin.uuids[0], 1080).condition == Condition.NO_PERMISSION.value
    assert not list(directory.glob("*.json"))
    assert keeper.close() == []


def left_behind(directory, uuid: str, **fields) -> None:
    Records(directory)
    record = {"uuid": uuid, "boot": boot_id(), "pid": 1, "job": "dead", "mhz": 900, **fields}
    (directory / f"{uuid}.json").write_text(json.dumps(record))


def test_what_a_killed_process_left_is_restored(standin, directory):
    standin.gpus[1].locked_min = standin.gpus[1].locked_max = 900
    left_behind(directory, standin.uuids[1])
    assert restore_left(directory) == ([standin.uuids[1]], [])
    assert standin.locked == [0] * 4
    assert restore_left(directory) == ([], [])


def test_what_a_killed_process_left_is_restored_by_the_next_job_that_takes_the_gpu(keeper, standin, directory):
    standin.gpus[1].locked_min = standin.gpus[1].locked_max = 900
    left_behind(directory, standin.uuids[1])
    keeper.take(standin.uuids[1])
    assert standin.locked == [0] * 4
    keeper.close()


def test_a_record_of_another_boot_is_dropped_and_the_clock_left_alone(standin, directory):
    standin.gpus[1].locked_min = standin.gpus[1].locked_max = 900  # by an operator, since then
    left_behind(directory, standin.uuids[1], boot="of last week")
    assert restore_left(directory) == ([], [])
    assert standin.locked == [0, 900, 0, 0]
    assert not list(directory.glob("*.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"uuid": 3}', "\x00"])
def test_a_damaged_record_counts_as_a_lock_that_was_left(standin, directory, text):
    Records(directory)
    standin.gpus[0].locked_min = standin.gpus[0].locked_max = 900
    (directory / f"{standin.uuids[0]}.json").write_text(text)
    assert restore_left(directory) == ([standin.uuids[0]], [])
    assert standin.locked == [0] * 4


def test_a_gpu_with_a_living_owner_is_not_restored(keeper, standin, directory):
    keeper.lock(standin.uuids[0], 1080)
    assert restore_left(directory) == ([], [])
    assert standin.locked[0] == 1080
    keeper.close()


def test_a_lost_gpu_keeps_its_record_until_it_is_back(keeper, standin, directory):
    keeper.lock(standin.uuids[0], 1080)
    standin.gpus[0].fails = 15
    assert "lost GPU" in keeper.close()[0]
    assert "lost GPU" in restore_left(directory)[1][0]
    standin.gpus[0].fails = 0
    assert restore_left(directory) == ([standin.uuids[0]], [])
    assert standin.locked == [0] * 4


def test_a_busy_driver_is_asked_again(keeper, standin, monkeypatch):
    keeper.lock(standin.uuids[0], 1080)
    standin.gpus[0].fails = 27
    monkeypatch.setattr("elastic.power.keeper.time.sleep", lambda _: setattr(standin.gpus[0], "fails", 0))
    assert keeper.close() == []
    assert standin.locked == [0] * 4


def test_a_directory_in_which_others_may_write_is_refused(directory):
    directory.mkdir()
    directory.chmod(0o777)
    assert refused(Records, directory).condition == Condition.NO_RECORD.value


def test_a_directory_that_is_a_link_is_refused(directory, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    directory.symlink_to(tmp_path / "elsewhere")
    assert "which is no directory" in str(refused(Records, directory))
    directory.unlink()
    directory.write_text("")
    assert refused(Records, directory).condition == Condition.NO_RECORD.value


def test_a_lock_file_that_is_a_link_is_refused(keeper, standin, directory, tmp_path):
    (directory / f"{standin.uuids[0]}.lock").symlink_to(tmp_path / "target")
    assert "cannot be recorded in" in str(refused(keeper.lock, standin.uuids[0], 1080))
    assert not (tmp_path / "target").exists()
    assert standin.gpus[0].sets == 0


def test_a_clock_comes_back_although_somebody_removed_its_record(keeper, standin, directory):
    keeper.lock(standin.uuids[0], 1080)
    shutil.rmtree(directory)
    assert keeper.close() == []
    assert standin.locked == [0] * 4


@pytest.mark.parametrize("uuid", ["", "GPU-", "../GPU-x", "GPU-a/b", "GPU-" + "x" * 200])
def test_a_uuid_that_is_none_names_no_file(directory, uuid):
    assert refused(Records(directory).own, uuid).condition == Condition.NO_GPU.value


def test_a_clock_is_not_locked_if_it_cannot_be_recorded(keeper, standin, directory):
    keeper.take(standin.uuids[0])
    (directory / f"{standin.uuids[0]}.new").mkdir()
    assert "no record of it can be written" in str(refused(keeper.lock, standin.uuids[0], 1080))
    assert standin.gpus[0].sets == 0
    keeper.close()


def test_a_full_disk_is_an_error_that_says_what_to_do(keeper, standin, directory):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        error = refused(keeper.lock, standin.uuids[0], 1080)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.condition == Condition.NO_RECORD.value
    assert "with free space" in str(error)
    assert standin.gpus[0].sets == 0
    assert {path.name for path in directory.iterdir()} == {f"{standin.uuids[0]}.lock"}


def test_a_record_of_any_garbage_counts_as_left(directory):
    records = Records(directory)
    for garbage in ("", "[" * 200_000, "[]", "7", "\0", '{"boot": 7}', '{"uuid": "", "boot": 7, "pid": 1, "job": "", "mhz": 1}'):
        (directory / "GPU-0.json").write_text(garbage)
        owned = records.own("GPU-0")
        assert owned.left
        owned.release()


@pytest.mark.parametrize("made", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_counts_as_left_and_is_removed(standin, directory, made):
    records = Records(directory)
    made(directory / f"{standin.uuids[0]}.json")
    assert restore_left(directory) == ([standin.uuids[0]], [])
    assert records.uuids() == []


def test_a_directory_in_the_place_of_a_record_is_refused_when_a_clock_is_set(keeper, standin, directory):
    Records(directory)
    (directory / f"{standin.uuids[0]}.json").mkdir()
    assert restore_left(directory) == ([], [])
    assert "no record of it can be written" in str(refused(keeper.lock, standin.uuids[0], 1080))
    assert standin.gpus[0].sets == 0


def test_a_directory_that_cannot_be_looked_at_is_no_error_for_jobs_without_clocks(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CLOCKS", str(tmp_path / ("x" * 300)))  # as another user's
    assert restore_left(clocks_directory()) == ([], [])
    _restore_clocks()
    assert refused(Records, clocks_directory()).condition == Condition.NO_RECORD.value
