"""Tests that launchers that are interrupted or killed, and jobs whose processes are, leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Leftovers, wait_for_end
from tests.process.conftest import Launcher

pytestmark = pytest.mark.slow

GONE_S = 5.0


def test_an_exception_is_shown_once_with_its_place(launch: type[Launcher], leftovers: Leftovers) -> None:
    code, out, err = launch("fails_in_the_script", "2").finish()
    assert leftovers.processes() == {}
    assert code == 1
    assert out == ""
    assert "worker 1 failed in epoch 1, step 4" in err
    assert err.count("ValueError: a wrong turn") == 1
    assert err.count('raise ValueError("a wrong turn")') == 1
    assert "elastic/worker/main.py" not in err


@pytest.mark.long
def test_lines_of_different_workers_never_mix(launch: type[Launcher]) -> None:
    launcher = launch("prints_lines", "3", PYTHONUNBUFFERED="1")
    printed = [(entry["worker"], entry["line"]) for entry in launcher.lines(3 * 500)]
    assert sorted(printed) == [(worker, line) for worker in range(3) for line in range(500)]


@pytest.mark.long
def test_a_script_without_a_guard_is_told_to_have_one(launch: type[Launcher]) -> None:
    code, _, err = launch(script="unguarded.py").finish()
    assert code == 1
    assert 'put the call under `if __name__ == "__main__":`' in err


def test_no_etcd_binary(launch: type[Launcher], tmp_path: Path) -> None:
    environment = Path(sys.prefix)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "lib").symlink_to(environment / "lib")
    (tmp_path / "pyvenv.cfg").write_text((environment / "pyvenv.cfg").read_text())
    launcher = launch("steps_until_stopped", "2", python=str(tmp_path / "bin" / "python"), PATH=str(tmp_path / "nothing"))
    code, _, err = launcher.finish()
    assert code == 1
    assert err.rstrip().splitlines()[-1].startswith("elastic.errors.EtcdMissing: no etcd binary on PATH")


def test_ctrl_c_once_stops_at_a_step_boundary(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("steps_until_stopped", "2")
    launcher.lines(2)
    launcher.process.send_signal(signal.SIGINT)
    code, out, err = launcher.finish()
    assert leftovers.processes() == {}
    steps, epoch, stopped = json.loads(out)
    assert (code, epoch, stopped) == (0, 0, True)
    assert steps >= 1
    lines = [line for line in err.splitlines() if "asked to stop" not in line]  # it prints that on a busy machine
    assert lines == ["elastic: stopping at the next step boundary; press Ctrl-C again to stop at once"]


@pytest.mark.long
def test_ctrl_c_twice_stops_at_once(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "2")
    launcher.lines(2)
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.process.stderr is not None
    assert "stopping at the next step boundary" in launcher.process.stderr.readline()
    launcher.process.send_signal(signal.SIGINT)
    code, _, err = launcher.finish()
    assert leftovers.processes() == {}
    assert code == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.long
def test_the_launchers_death_ends_the_job_even_stopped_workers(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "2")
    running = launcher.lines(2)
    assert {entry["pid"] for entry in running} < leftovers.processes().keys()
    launcher.process.kill()
    leftovers.wait(GONE_S)
    assert leftovers.processes() == {}
    assert leftovers.files() == []


@pytest.mark.long
def test_the_launchers_death_ends_the_job_of_a_stopped_agent_too(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "2")
    os.kill(launcher.lines(2)[0]["agent"], signal.SIGSTOP)
    launcher.process.kill()
    leftovers.wait(GONE_S)
    assert leftovers.processes() == {}
    assert leftovers.files() == []


def test_the_agents_death_ends_the_job(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "2")
    agent = launcher.lines(2)[0]["agent"]
    launcher.process.send_signal(signal.SIGSTOP)  # it cannot clean up: the kernel ends the rest
    os.kill(agent, signal.SIGKILL)
    for pid in leftovers.processes().keys() - {launcher.process.pid}:
        with suppress(ProcessLookupError):
            assert wait_for_end(pid, GONE_S)
    assert list(leftovers.processes()) == [launcher.process.pid]
    launcher.process.send_signal(signal.SIGCONT)
    code, _, err = launcher.finish()
    assert leftovers.processes() == {}
    assert code == 1
    assert err.rstrip().splitlines()[-1].startswith("elastic.errors.HostLost: the agent, which supervises the workers, died")


def test_a_workers_death_is_reported_with_its_last_step(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "3")
    victim = next(entry for entry in launcher.lines(3) if entry["worker"] == 2)
    os.kill(victim["pid"], signal.SIGKILL)
    code, _, err = launcher.finish()
    assert leftovers.processes() == {}
    assert code == 1
    assert f"worker 2 (process {victim['pid']}) was killed by SIGKILL in epoch 2, step 5" in err


def test_the_fork_servers_death_ends_the_job(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "2")
    workers = launcher.lines(2)
    os.kill(workers[0]["parent"], signal.SIGKILL)
    for worker in workers:
        assert worker["pid"] not in leftovers.processes() or wait_for_end(worker["pid"], GONE_S)
    code, _, err = launcher.finish()
    assert code == 1
    assert err.count("elastic.errors.JobFailed") == 1
