"""Tests deaths of members of a view: which of them end a job, and what a run records of its changes."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.errors import JobFailed
from tests.conftest import Leftovers
from tests.etcd_access import etcd_with
from tests.process import functions
from tests.process.conftest import Launcher
from tests.process.functions import PAUSE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]


class Chaos(threading.Thread):
    """Does `plan` beside a job whose run directory is `kept`; a failure in it is raised by `result`."""

    def __init__(self, kept: Path, plan: Callable[[Chaos], None]) -> None:
        super().__init__(daemon=True)
        self.kept, self._plan, self._error = kept, plan, None
        self.start()

    def members(self, epoch: int) -> dict[str, Any]:
        """Returns members.json as soon as it has this epoch or a later one."""
        for _ in range(3000):
            with suppress(FileNotFoundError):
                record = json.loads((self.kept / "members.json").read_text())
                if record["epoch"] >= epoch:
                    return record
            PAUSE.wait(0.01)
        raise TimeoutError(f"epoch {epoch} is not reached")

    def run(self) -> None:
        try:
            self._plan(self)
        except BaseException as error:
            self._error = error
            traceback.print_exc()
            for child in children(os.getpid()):  # nobody else would end the job
                if Path(f"/proc/{child}/comm").read_text().strip() == "elastic-agent":
                    os.kill(int(child), signal.SIGKILL)

    def result(self) -> None:
        self.join(10)
        if self._error is not None:
            raise self._error


def kill(record: dict[str, Any], *workers: int) -> None:
    pids = {member["worker"]: member["pid"] for member in record["members"]}
    for worker in workers:
        os.kill(pids[worker], signal.SIGKILL)


@pytest.mark.long
def test_workers_die_one_by_one_and_together_and_are_replaced(tmp_path: Path) -> None:
    def plan(chaos: Chaos) -> None:
        kill(chaos.members(1), 1)
        kill(chaos.members(3), 0, 2)
        chaos.members(5)
        (tmp_path / "finish").touch()

    chaos = Chaos(tmp_path / "run", plan)
    result = elastic.run(functions.obeys, workers=3, args=[str(tmp_path)], directory=tmp_path / "run")
    chaos.result()
    assert result.epoch == result.value["epoch"] >= 5
    assert set(result.value["members"]) <= {3, 4, 5}, "none of the first ones is left"
    assert [found["kind"] for found in result.incidents][:2] == ["death", "join"]
    assert [json.loads(line) for line in (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()] == list(result.incidents)


def private_etcd(record: dict[str, Any]) -> int:
    (etcd,) = [int(pid) for pid in children(record["agent"]) if Path(f"/proc/{pid}/comm").read_text().strip() == "etcd"]
    return etcd


@pytest.mark.long
def test_an_etcd_that_stands_still_pauses_the_recovery_and_nothing_else(tmp_path: Path) -> None:
    def plan(chaos: Chaos) -> None:
        record = chaos.members(1)
        os.kill(etcd.pid, signal.SIGSTOP)
        kill(record, 1)
        PAUSE.wait(3.0)  # longer than the lease
        assert chaos.members(1)["epoch"] == 1
        os.kill(etcd.pid, signal.SIGCONT)
        chaos.members(2)
        (tmp_path / "finish").touch()

    with etcd_with(tmp_path / "external") as etcd:
        chaos = Chaos(tmp_path / "run", plan)
        result = elastic.run(
            functions.obeys, workers=3, args=[str(tmp_path)], directory=tmp_path / "run", respawn=False, etcd=str(etcd.endpoint())
        )
    chaos.result()
    assert result.value == {"epoch": 2, "members": [0, 2]}
    assert result.incidents[0]["stall_ms"] > 2000


@pytest.mark.long
def test_a_private_etcd_that_is_stopped_for_ever_is_replaced_in_seconds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def plan(chaos: Chaos) -> None:
        record = chaos.members(1)
        os.kill(private_etcd(record), signal.SIGSTOP)
        kill(record, 1)
        chaos.members(2)
        (tmp_path / "finish").touch()

    chaos = Chaos(tmp_path / "run", plan)
    result = elastic.run(functions.obeys, workers=3, args=[str(tmp_path)], directory=tmp_path / "run", respawn=False)
    chaos.result()
    assert result.value == {"epoch": 2, "members": [0, 2]}
    assert 3000 < result.incidents[0]["stall_ms"] < 15000
    assert "the private etcd cannot be reached (no answer in time): it is killed and restarted" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("removed", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_private_etcd_that_dies_is_started_again_for_the_recovery(
    removed: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It dies twice. With `removed`, something also deletes its files the second time."""

    def plan(chaos: Chaos) -> None:
        record = chaos.members(1)
        for number, lost in enumerate((1, 2)):
            etcd = private_etcd(record)
            if number and removed:
                shutil.rmtree(tmp_path / "run" / "etcd")
            os.kill(etcd, signal.SIGKILL)
            kill(record, lost)
            record = chaos.members(2 + number)
        (tmp_path / "finish").touch()

    chaos = Chaos(tmp_path / "run", plan)
    result = elastic.run(functions.obeys, workers=3, args=[str(tmp_path)], directory=tmp_path / "run", respawn=False)
    chaos.result()
    assert result.value == {"epoch": 3, "members": [0]}
    assert "the private etcd was killed by SIGKILL: it is restarted" in capfd.readouterr().err


@pytest.mark.long
def test_an_etcd_that_takes_little_and_comes_back_empty_serves_recoveries_of_a_job_with_much_to_say(tmp_path: Path) -> None:
    """Its limit of a request is 1,500 bytes, and the job's arguments are 2 MB."""

    def plan(chaos: Chaos) -> None:
        kill(chaos.members(1), 1)
        record = chaos.members(2)
        etcd.kill()
        etcd.start(empty=True)
        kill(record, 2)
        chaos.members(3)
        (tmp_path / "finish").touch()

    with etcd_with(tmp_path / "external", max_request_bytes="1500") as etcd:
        chaos = Chaos(tmp_path / "run", plan)
        arguments = [str(tmp_path), "x" * 2_000_000]
        result = elastic.run(
            functions.obeys, workers=3, args=arguments, directory=tmp_path / "run", respawn=False, etcd=str(etcd.endpoint())
        )
    chaos.result()
    assert result.value == {"epoch": 3, "members": [0]}


ptrace = ctypes.CDLL(None).ptrace
ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
ptrace.restype = ctypes.c_long


@pytest.mark.long
def test_a_death_is_recovered_from_though_the_fork_server_is_stopped_for_good(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def plan(chaos: Chaos) -> None:
        record = chaos.members(1)
        victim = next(member["pid"] for member in record["members"] if member["worker"] == 1)
        forks = int(Path(f"/proc/{victim}/stat").read_text().rpartition(")")[2].split()[1])
        for request in (0x4206, 0x4207):  # PTRACE_SEIZE, PTRACE_INTERRUPT: SIGCONT has no effect while this thread lives
            assert ptrace(request, forks, None, None) == 0
        kill(record, 1)
        chaos.members(2)
        (tmp_path / "finish").touch()
        PAUSE.wait(1.0)

    chaos = Chaos(tmp_path / "run", plan)
    result = elastic.run(functions.obeys, workers=3, args=[str(tmp_path)], directory=tmp_path / "run", respawn=False)
    chaos.result()
    assert result.value == {"epoch": 2, "members": [0, 2]}
    said = capfd.readouterr().err
    assert "which starts workers and reports how they end, was stopped and is continued now" in said
    assert "ended for an unknown reason, since the fork server does not answer" in said


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.long
def test_the_last_workers_death_ends_the_job(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("joins", "1")
    (worker,) = launcher.lines(1)
    os.kill(worker["pid"], signal.SIGKILL)
    code, _, err = launcher.finish()
    assert leftovers.processes() == {}
    assert code == 1
    assert "was killed by SIGKILL; it was the only worker: no copy of the state is left" in err


@pytest.mark.long
def test_below_the_minimum_without_respawn_the_job_ends(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    members: dict[str, Any] = {}

    def plan(chaos: Chaos) -> None:
        members.update(chaos.members(1))
        kill(members, 1)

    chaos = Chaos(kept, plan)
    with pytest.raises(JobFailed, match=r"1 worker left, .* min_workers=2; none can be started \(respawn is off\).*worker 1 .*SIGKILL"):
        elastic.run(functions.joins, workers=2, min_workers=2, respawn=False, directory=kept)
    chaos.result()
    assert (members["epoch"], members["attempt"], members["coordinator"]) == (1, 0, 0)
    assert [(member["worker"], member["stage"]) for member in members["members"]] == [(0, 0), (1, 0)]
    shown = ["events.jsonl", "incidents.jsonl", "live.json", "members.json", "output"]
    assert sorted(os.listdir(kept)) == shown, "what only the running job needed is gone"
    assert json.loads((kept / "incidents.jsonl").read_text())["worker"] == 1


@pytest.mark.long
def test_memory_that_ran_out_is_a_death_and_not_a_bug() -> None:
    with pytest.raises(JobFailed, match=r"the last loss: worker 1 .* failed with MemoryError: no room"):
        elastic.run(functions.runs_out_of_memory, workers=2, min_workers=2, respawn=False)
    with pytest.raises(JobFailed, match="ValueError: a bug"):
        elastic.run(functions.fails_after_joining, workers=2)


@pytest.mark.long
def test_a_death_behind_the_leaders_result_does_not_matter(tmp_path: Path) -> None:
    result = elastic.run(functions.leader_joins_and_returns, workers=2, args=[str(tmp_path)], respawn=False)
    assert result.value == "done"


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(elastic.errors.SettingsError, match=r"directory=.*file/x' cannot be used: Not a directory"):
        elastic.run(functions.joins, workers=1, directory=tmp_path / "file" / "x")
