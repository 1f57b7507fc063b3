"""Tests the run directory: symbolic links and other users' files in it, and the check of its owner and mode."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic.errors import SettingsError
from elastic.host import rundir
from elastic.host.rundir import RunDirectory
from elastic.observe.activity import Activity, read
from elastic.power import energy_file
from tests.conftest import no_file_may_have_more_than

MADE = ["activity", "torchinductor"]


def test_symbolic_links_in_it_go_and_what_they_point_to_stays(tmp_path: Path) -> None:
    run, others = RunDirectory(tmp_path / "run"), tmp_path / "others"
    (others / "inner").mkdir(parents=True)
    (others / "0").write_text("precious")
    run.path.mkdir()
    for name in ("members.new", "members.json", "incidents.jsonl", "faults.jsonl"):
        (run.path / name).symlink_to(others / "0")
    for name in ("activity", "torchinductor", "etcd", "links"):
        (run.path / name).symlink_to(others)
    run.prepare()
    assert sorted(path.name for path in run.path.iterdir() if not path.is_symlink()) == MADE
    Activity(run.path, 0).enter("idle", 3, 1)
    run.write_members({"epoch": 1})
    assert run.members.read_text() == '{"epoch": 1}'
    run.clear()
    assert [path.name for path in run.path.iterdir()] == ["members.json"]
    assert (others / "0").read_text() == "precious"
    assert (others / "inner").is_dir()


def test_links_that_come_while_the_job_runs_are_not_followed(tmp_path: Path) -> None:
    run, precious = RunDirectory(tmp_path / "run"), tmp_path / "precious"
    precious.write_text("precious")
    run.prepare()
    (run.path / "members.new").symlink_to(precious)
    (run.path / "activity" / "0.new").symlink_to(precious)
    run.write_members({})
    Activity(run.path, 0).enter("idle", 3, 1)
    assert precious.read_text() == "precious"
    assert (found := read(run.path, 0)) is not None
    assert found.step == 3
    (run.path / "activity" / "0").unlink()
    (run.path / "activity").rmdir()
    (run.path / "activity").symlink_to(tmp_path)
    Activity(run.path, 1)
    assert not (tmp_path / "1").exists()


def test_the_directory_of_a_running_job_is_refused_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second job removed the etcd and the sockets of the first."""
    monkeypatch.setattr(rundir, "_IN_USE_S", 0.1)
    same = tmp_path / "same"
    same.symlink_to(tmp_path / "run")
    with RunDirectory(tmp_path / "run").prepared():
        (tmp_path / "run" / "etcd").mkdir()
        with pytest.raises(SettingsError, match="same' is in use by another job"), RunDirectory(same).prepared():
            pass
        assert (tmp_path / "run" / "etcd").is_dir()
    with RunDirectory(same).prepared():
        assert not (tmp_path / "run" / "etcd").exists()


def test_the_next_job_waits_until_the_agent_of_a_killed_launcher_has_ended(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).prepared() as lock:
        agent = subprocess.Popen(["sleep", "0.3"], pass_fds=[lock])
    with RunDirectory(tmp_path).prepared():
        assert agent.wait(1) == 0


def test_where_directories_cannot_be_locked_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with RunDirectory(tmp_path).prepared(), RunDirectory(tmp_path).prepared():
        assert (tmp_path / "activity").is_dir()


def test_a_directory_that_every_user_may_write_in_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(SettingsError, match="can be written by every user of this host"):
        RunDirectory(tmp_path).prepare()
    tmp_path.chmod(0o1777)  # sticky: no user can replace the files of another
    RunDirectory(tmp_path).prepare()


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(SettingsError, match=rf"belongs to another user of this host \(uid {own}\)"):
        RunDirectory(tmp_path).prepare()


def test_what_of_another_user_is_in_it_and_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "activity").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    with pytest.raises(SettingsError, match=r"cannot be used: File exists \(activity\)"):
        RunDirectory(tmp_path).prepare()


def test_who_may_only_read_the_directory_cannot_keep_a_job_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(0o755)
    descriptor = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with RunDirectory(tmp_path / "run").prepared():
        assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "run").iterdir()} == {0}
    os.close(descriptor)


def test_a_lock_that_a_job_has_removed_at_its_end_locks_nothing(tmp_path: Path) -> None:
    """One that waited for it makes a new one, which the next job finds."""
    run = RunDirectory(tmp_path)
    with run.prepared() as old, ThreadPoolExecutor() as threads:
        waiting = threads.submit(run._locked)
        until = time.monotonic() + 5.0
        while len([name for name in os.listdir("/proc/self/fd") if _same(name, old)]) < 2:
            assert time.monotonic() < until
        run.clear()
        fcntl.flock(old, fcntl.LOCK_UN)
        lock = waiting.result(10.0)
        assert os.path.samestat(os.fstat(lock), (tmp_path / "lock").stat())
        assert not os.path.samestat(os.fstat(lock), os.fstat(old))
        os.close(lock)


def _same(name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(int(name)), os.fstat(descriptor))
    except OSError:
        return False


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("written", ["members", "live", "energy"])
def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(tmp_path: Path, written: str, room: int) -> None:
    run = RunDirectory(tmp_path)
    write = {"members": run.write_members, "live": run.write_live, "energy": lambda content: energy_file.write(run.path, content)}[written]
    write({"epoch": 1})
    with no_file_may_have_more_than(room):
        write({"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == [f"{written}.json"]
    assert (tmp_path / f"{written}.json").read_text() == '{"epoch": 1}'


def test_what_an_agent_that_was_killed_was_writing_is_removed_at_the_end_of_the_job(tmp_path: Path) -> None:
    for name in ("members.new", "live.new", "energy.new", "members.json"):
        (tmp_path / name).write_text("{")
    RunDirectory(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["members.json"]
