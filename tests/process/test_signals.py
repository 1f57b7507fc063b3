"""Tests signals from outside: the job stops at a step boundary, whichever process gets the signal, and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from elastic.errors import Terminated
from elastic.host import signals
from elastic.host.channel import Channel
from elastic.host.signals import StopRequests
from tests.conftest import Leftovers
from tests.process.conftest import Launcher


@pytest.fixture
def line() -> Iterator[tuple[Channel, Channel]]:
    launcher, agent = map(Channel, socket.socketpair())
    agent.sock.setblocking(False)
    yield launcher, agent
    launcher.close()
    agent.close()


def told(agent: Channel) -> list[str]:
    return [message["type"] for message in agent.drain()]


Line = tuple[Channel, Channel]


def test_a_signal_that_comes_before_the_agent_listens_is_not_lost(line: Line, capsys: pytest.CaptureFixture[str]) -> None:
    requests = StopRequests()
    with requests.caught():
        signal.raise_signal(signal.SIGTERM)
        assert told(line[1]) == []
        with requests.forwarded(line[0]):
            assert told(line[1]) == ["stop"]
    assert requests.first is signal.SIGTERM
    assert capsys.readouterr().err == "elastic: SIGTERM: stopping at the next step boundary; send it again to stop at once\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("number", "raised", "code"),
    [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, Terminated, 143), (signal.SIGHUP, Terminated, 129)],
)
@pytest.mark.parametrize("early", [True, False])
def test_the_second_signal_stops_at_once(
    line: Line, number: signal.Signals, raised: type[BaseException], code: int | None, early: bool
) -> None:
    requests = StopRequests()

    def twice() -> None:
        signal.raise_signal(number)
        signal.raise_signal(number)

    def job() -> None:
        if early:
            twice()
        with requests.forwarded(line[0]):
            twice()

    with requests.caught(), pytest.raises(raised) as caught:
        job()
    assert told(line[1]) == ["stop", "kill"]
    assert getattr(caught.value, "code", None) == code


def test_what_cleans_up_is_not_interrupted_and_what_was_ignored_stays_so(line: Line) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests = StopRequests()
        with requests.caught():
            with requests.forwarded(line[0]):
                pass
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGHUP)
        assert told(line[1]) == []
        assert requests.first is signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_signals_stay_what_they_were() -> None:
    found = []

    def body() -> None:
        with StopRequests().caught():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_a_closed_terminal_does_not_harm_the_stop(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    requests = StopRequests()
    with requests.caught(), requests.forwarded(line[0]):
        signal.raise_signal(signal.SIGHUP)
    assert told(line[1]) == ["stop"]


WORKER = """
import multiprocessing, os, signal, sys, time
from elastic.host import signals
signals.ALONE_S = 0.3
stopping = sys.argv[1] == "stopping"
signals.outlive_a_stop(lambda: stopping)
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
child.terminate()
child.join()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(1.5)
print(child.exitcode)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("said", "status", "out"), [("stopping", 0, "-15\n"), ("alone", -signal.SIGTERM, "")])
def test_a_worker_outlives_a_signal_for_all_but_not_one_for_it_alone(said: str, status: int, out: str) -> None:
    done = subprocess.run([sys.executable, "-c", WORKER, said], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, "")


def test_a_process_that_begins_shielded_loses_no_signal() -> None:
    code = (
        "import time; time.sleep(0.2); from elastic.host import signals; signals.obey(lambda: print('asked', flush=True)); time.sleep(0.05)"
    )
    with signals.shielded():
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGTERM)  # long before it can install a handler
    assert process.communicate(timeout=20)[0] == "asked\n"
    assert process.returncode == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []).intersection(signals.STOPPING)


def everywhere(launcher: Launcher, leftovers: Leftovers) -> None:
    """As systemd does, and Slurm: to every process of the job, etcd included."""
    for pid in leftovers.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def alone(launcher: Launcher, leftovers: Leftovers) -> None:
    launcher.process.send_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize("terminate", [pytest.param(alone, marks=pytest.mark.long), everywhere])
def test_sigterm_stops_at_a_step_saves_it_and_leaves_nothing(
    launch: type[Launcher], leftovers: Leftovers, tmp_path: Path, terminate: Callable[[Launcher, Leftovers], None]
) -> None:
    """The job is one that a shell without job control started in the background: there SIGINT is ignored."""
    launcher = launch("trains_until_stopped", "2", ignored=(signal.SIGINT,), CHECKPOINTS=str(tmp_path / "saved"))
    launcher.lines(3)
    launcher.process.send_signal(signal.SIGINT)
    launcher.lines(3)
    terminate(launcher, leftovers)
    code, out, err = launcher.finish()
    assert code == 143, err
    assert leftovers.processes() == {}
    assert leftovers.files() == []
    last = json.loads(out.splitlines()[-1])["step"]
    assert [path.name for path in (tmp_path / "saved").glob("step-*")] == [f"step-{last + 1:08}"]
    etcd = [line for line in err.splitlines() if "the private etcd was killed by SIGTERM" in line]  # it is one of all the processes
    assert len(etcd) <= (terminate is everywhere)
    assert [line for line in err.splitlines() if line not in etcd and "asked to stop" not in line] == [  # the second on a busy machine
        "elastic: SIGTERM: stopping at the next step boundary; send it again to stop at once"
    ]


@pytest.mark.slow
def test_sigterm_to_all_while_the_job_starts_and_again_to_stop_at_once(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "2")
    deadline = time.monotonic() + 20
    while not any(name.startswith("elastic-") for name in leftovers.files()) and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(3):  # the launcher, its agent, and the fork server, which has not started yet
        everywhere(launcher, leftovers)
        if launcher.process.poll() is None:
            time.sleep(0.1)
    code, _, err = launcher.finish()
    assert code == 143, err
    assert leftovers.processes() == {}
    assert "Traceback" not in err


@pytest.mark.long
@pytest.mark.slow
def test_sigterm_to_one_worker_is_its_death(launch: type[Launcher], leftovers: Leftovers) -> None:
    launcher = launch("never_stops", "3")
    victim = next(entry for entry in launcher.lines(3) if entry["worker"] == 2)
    os.kill(victim["pid"], signal.SIGTERM)
    code, _, err = launcher.finish()
    assert code == 1
    assert f"worker 2 (process {victim['pid']}) was killed by SIGTERM in epoch 2, step 5" in err
