"""Tests that clocks come back: after a normal end, and after SIGKILL of the agent, of its guardian, and of both."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from elastic.errors import PowerError, SettingsError
from elastic.power.clocks import Clocks
from elastic.power.conditions import Condition
from elastic.power.daemon import Daemon
from elastic.power.keeper import restore_left
from examples.nvml_standin import NOBODY, ONLY_ROOT, ROOT, StandIn
from tests.conftest import wait_for_end

HOME = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


class Setter:
    """`agent.py` in a process."""

    def __init__(self, job: str, *clocks: tuple[str, int]) -> None:
        words = [sys.executable, "-m", "tests.power.agent", job, *(f"{uuid}={mhz}" for uuid, mhz in clocks)]
        self.process = subprocess.Popen(words, cwd=HOME, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.guardian: int = self.heard()["guardian"]

    def heard(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process ended early"
        return json.loads(line)

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()


@pytest.fixture
def setter(standin, monkeypatch, tmp_path) -> Iterator[type[Setter]]:
    started: list[Setter] = []
    monkeypatch.setenv("ELASTIC_POWER_SOCKET", str(tmp_path / "no-daemon"))

    class Started(Setter):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            started.append(self)

    yield Started
    for each in started:
        for end in (each.process.kill, lambda each=each: os.kill(each.guardian, signal.SIGKILL)):
            with suppress(ProcessLookupError, TypeError):
                end()
        each.process.communicate()


def restored(standin: StandIn, seconds: float) -> bool:
    """Whether no clock is locked any more, within this time."""
    until = time.monotonic() + seconds
    while any(standin.locked) and time.monotonic() < until:
        time.sleep(0.002)  # another process's doing, which nothing here can wait for
    return not any(standin.locked)


@pytest.mark.long
def test_a_normal_end_restores_the_clocks(setter, standin):
    agent = setter("a", (standin.uuids[0], 1080), (standin.uuids[3], 900))
    assert standin.locked == [1080, 0, 0, 900]
    agent.say("close")
    assert agent.heard() == []
    assert standin.locked == [0] * 4
    assert wait_for_end(agent.process.pid, 10)


def test_the_guardian_restores_the_clocks_of_an_agent_that_is_killed(setter, standin):
    agent = setter("a", (standin.uuids[0], 1080), (standin.uuids[3], 900))
    agent.process.kill()
    assert restored(standin, 5.0)


def test_a_guardian_that_is_stopped_goes_on_when_its_agent_is_killed(setter, standin):
    agent = setter("a", (standin.uuids[0], 1080))
    os.kill(agent.guardian, signal.SIGSTOP)
    agent.process.kill()
    assert restored(standin, 5.0)
    assert wait_for_end(agent.guardian, 10)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_guardian_that_is_killed_has_a_successor_that_restores(setter, standin, number):
    agent = setter("a", (standin.uuids[1], 1080))
    first = agent.guardian
    os.kill(first, number)
    wait_for_end(first, 10)
    assert standin.locked[1] == (1080 if number == signal.SIGKILL else 0)
    agent.say("")
    told = agent.heard()
    assert told["guardian"] != first
    assert standin.gpus[1].resets == 1
    assert told["restored"] == ([standin.uuids[1]] if number == signal.SIGKILL else [])
    assert standin.locked == [0] * 4


@pytest.mark.long
def test_after_both_are_killed_the_next_job_restores(setter, standin, tmp_path):
    agent = setter("a", (standin.uuids[1], 1080), (standin.uuids[2], 990))
    os.kill(agent.guardian, signal.SIGKILL)
    agent.process.kill()
    agent.process.wait()
    wait_for_end(agent.guardian, 10)
    assert standin.locked == [0, 1080, 990, 0]
    other = setter("b", (standin.uuids[0], 900))
    assert standin.locked == [900, 0, 0, 0]
    other.say("close")
    assert other.heard() == []


@pytest.mark.long
def test_the_terminal_does_not_reach_the_guardian(setter, standin):
    agent = setter("a", (standin.uuids[0], 1080))
    for number in (signal.SIGINT, signal.SIGHUP):
        os.kill(agent.guardian, number)
    assert os.getsid(agent.guardian) == agent.guardian
    agent.say("close")
    assert agent.heard() == []


@pytest.mark.long
def test_without_permission_the_error_says_what_to_do(setter, standin, tmp_path):
    for gpu in standin.gpus:
        gpu.may_set = NOBODY
    clocks = Clocks("a", tmp_path / "clocks", tmp_path / "no-daemon")
    with pytest.raises(PowerError, match="start `elastic power-daemon` as root") as caught:
        clocks.lock(standin.uuids[0], 1080)
    assert caught.value.condition == Condition.NO_PERMISSION.value
    assert clocks.close() == []


@pytest.mark.long
def test_guardians_that_die_again_and_again_are_given_up(setter, standin, tmp_path):
    clocks = Clocks("a", tmp_path / "clocks", tmp_path / "no-daemon")

    def die() -> None:
        assert clocks._guardian is not None
        clocks._guardian.kill()
        clocks._guardian.wait()
        clocks.renew()

    try:
        for _ in range(3):
            die()
        with pytest.raises(PowerError, match="has died 4 times within 60 s"):
            die()
    finally:
        clocks.close()


class Power:
    """`elastic power-daemon` in a process, as root of the stand-in."""

    def __init__(self, standin: StandIn, socket: Path, gpus: list[str], users: list[int], directory: Path) -> None:
        code = (
            "import sys, json; from pathlib import Path; from elastic.power.daemon import run; a = json.loads(sys.argv[1]); "
            "run(Path(a[0]), a[1], a[2], Path(a[3]))"
        )
        words = [sys.executable, "-c", code, json.dumps([str(socket), gpus, users, str(directory)])]
        self.process = subprocess.Popen(words, cwd=HOME, env={**os.environ, ROOT: "1"}, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline()

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.communicate(timeout=20)


@pytest.fixture
def socket_path(standin, tmp_path, monkeypatch) -> Path:
    for gpu in standin.gpus:
        gpu.may_set = ONLY_ROOT
    monkeypatch.setenv("ELASTIC_POWER_SOCKET", str(tmp_path / "power.sock"))
    return tmp_path / "power.sock"


def test_the_daemon_sets_clocks_for_a_named_user_and_restores_them_with_the_connection(standin, socket_path, tmp_path):
    power = Power(standin, socket_path, standin.uuids[:2], [os.getuid()], tmp_path / "root")
    try:
        assert "listens at" in power.said
        clocks = Clocks("a", tmp_path / "clocks", socket_path)
        assert clocks.lock(standin.uuids[0], 1080) == 1080
        for uuid, mhz, condition in (
            (standin.uuids[2], 1080, Condition.NO_PERMISSION),
            (standin.uuids[1], 1081, Condition.BAD_CLOCK),
            ("../../etc/passwd", 1080, Condition.NO_PERMISSION),
        ):
            with pytest.raises(PowerError) as caught:
                clocks.lock(uuid, mhz)
            assert caught.value.condition == condition.value
        other = Clocks("b", tmp_path / "clocks", socket_path)
        with pytest.raises(PowerError, match="in the hands of job of user"):
            other.lock(standin.uuids[0], 900)
        assert standin.locked == [1080, 0, 0, 0]
        clocks._channel.close()  # as by SIGKILL
        assert restored(standin, 5.0)
        other.close()
    finally:
        power.end()
    assert not socket_path.exists()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_daemon_that_ends_restores_or_its_successor_does(standin, socket_path, tmp_path, number):
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    clocks = Clocks("a", tmp_path / "clocks", socket_path)
    clocks.lock(standin.uuids[0], 1080)
    power.end(number)
    assert standin.locked[0] == (1080 if number == signal.SIGKILL else 0)
    assert clocks.lost
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    try:
        assert standin.locked == [0] * 4
        clocks.renew()
        assert clocks.lock(standin.uuids[0], 900) == 900
        clocks.close()
    finally:
        power.end()
    assert standin.locked == [0] * 4


@pytest.mark.long
def test_the_daemon_refuses_other_users_and_what_is_no_request(standin, socket_path, tmp_path):
    power = Power(standin, socket_path, [], [os.getuid() + 1], tmp_path / "root")
    try:
        with pytest.raises(PowerError, match=f"user {os.getuid()} may not set clocks here"):
            Clocks("a", tmp_path / "clocks", socket_path)
    finally:
        power.end()
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    try:
        for line in (
            b"x" * 9000,
            b"[" * 4000 + b"\n",
            b"{}{\n",
            b"[1]\n",
            b'{"type": "run", "gpu": "ls"}\n',
            b'{"type": "lock", "gpu": 3, "mhz": true}\n',
        ):
            clocks = Clocks("a", tmp_path / "clocks", socket_path)
            clocks._channel.sock.sendall(line)
            answer = clocks._channel.receive()
            assert not answer or answer[0]["type"] == "refused"
            clocks.close()
        clocks = Clocks("a", tmp_path / "clocks", socket_path)
        assert clocks.lock(standin.uuids[0], 900) == 900
        clocks.close()
    finally:
        power.end()
    assert restore_left(tmp_path / "root") == ([], [])


@pytest.mark.skipif(os.getuid() != 0, reason="needs another user's process")
@pytest.mark.long
def test_the_daemon_knows_a_user_by_what_the_kernel_says(standin, socket_path, tmp_path):
    nobody = 65534
    ask = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(4096).decode(), flush=True); "
        's.sendall(b\'{"type": "lock", "gpu": "\' + sys.argv[2].encode() + b\'", "mhz": 1080}\\n\'); '
        "print(s.recv(4096).decode())"
    )
    for each in (socket_path.parent, *socket_path.parent.parents):
        if each.stat().st_uid == os.getuid() and each.stat().st_mode & 0o777 == 0o700:
            each.chmod(0o711)  # so that the other user reaches the socket
    for users, answer in (([os.getuid()], "may not set clocks here"), ([nobody], '"locked"')):
        power = Power(standin, socket_path, [], users, tmp_path / "root")
        try:
            words = ["/usr/bin/python3", "-c", ask, str(socket_path), standin.uuids[0]]
            done = subprocess.run(words, user=nobody, group=nobody, extra_groups=[], capture_output=True, text=True, cwd="/")
            assert answer in done.stdout + done.stderr
            assert standin.gpus[0].sets == (1 if nobody in users else 0)
            assert restored(standin, 5.0)
        finally:
            power.end()


@pytest.mark.long
def test_the_daemon_restores_a_clock_later_if_its_gpu_was_lost(standin, socket_path, tmp_path):
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    try:
        clocks = Clocks("a", tmp_path / "clocks", socket_path)
        clocks.lock(standin.uuids[0], 1080)
        standin.gpus[0].fails = 15
        assert "lost GPU" in clocks.close()[0]
        standin.gpus[0].fails = 0
        assert standin.locked[0] == 1080
        assert restored(standin, 10.0)
    finally:
        power.end()


@pytest.mark.long
def test_a_daemon_that_is_started_again_is_waited_for(standin, socket_path, tmp_path):
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    clocks = Clocks("a", tmp_path / "clocks", socket_path)
    clocks.lock(standin.uuids[0], 1080)
    power.end(signal.SIGKILL)
    assert clocks.lost
    with ThreadPoolExecutor(1) as pool:
        renewed = pool.submit(clocks.renew)
        assert standin.locked[0] == 1080
        power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
        assert renewed.result(30) == []
    try:
        assert standin.locked[0] == 0
        assert clocks._guardian is None
        assert clocks.lock(standin.uuids[0], 990) in (990, standin.gpus[0].idle_mhz)
        assert standin.locked[0] == 990
        assert clocks.close() == []
        assert standin.locked[0] == 0
    finally:
        power.end()


@pytest.mark.long
def test_a_daemon_that_is_killed_is_named_with_the_clocks_that_it_left(standin, socket_path, tmp_path, monkeypatch):
    monkeypatch.setattr("elastic.power.clocks._BACK_S", 0.2)
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    try:
        clocks = Clocks("a", tmp_path / "clocks", socket_path)
        clocks.lock(standin.uuids[0], 1080)
        power.end(signal.SIGKILL)
        socket_path.unlink()
        (complaint,) = clocks.renew()  # to a guardian of this user, who may not touch the lock
        assert "the power daemon has ended or does not answer" in complaint
        assert standin.uuids[0] in complaint
        with pytest.raises(PowerError, match="start `elastic power-daemon` as root"):
            clocks.lock(standin.uuids[1], 1080)
        assert clocks.close() == []
        assert standin.locked[0] == 1080
    finally:
        power.end()
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    assert restored(standin, 5.0)
    power.end()


@pytest.mark.long
def test_a_successor_that_cannot_start_does_not_hide_what_is_left(standin, socket_path, tmp_path, monkeypatch):
    monkeypatch.setattr("elastic.power.clocks._BACK_S", 0.2)
    power = Power(standin, socket_path, [], [os.getuid()], tmp_path / "root")
    clocks = Clocks("a", tmp_path / "clocks", socket_path)
    clocks.lock(standin.uuids[0], 1080)
    power.end(signal.SIGKILL)
    (tmp_path / "clocks").mkdir()
    (tmp_path / "clocks").chmod(0o777)
    why = "the process that keeps the clocks has ended, and no clock is set any more in this job: records of clocks cannot be kept"
    with pytest.raises(PowerError, match=rf"the power daemon has ended or does not answer: .*; {why}"):
        clocks.renew()
    assert clocks.close() == []


def test_a_daemon_leaves_the_socket_of_another_one(standin, socket_path, tmp_path):
    first = Power(standin, socket_path, standin.uuids[:1], [os.getuid()], tmp_path / "root")
    socket_path.unlink()  # by somebody
    second = Power(standin, socket_path, standin.uuids[:1], [os.getuid()], tmp_path / "root")
    try:
        first.end()
        assert socket_path.exists()
    finally:
        second.end()
    assert not socket_path.exists()


def test_a_daemon_does_not_take_the_socket_of_one_that_is_stopped(standin, socket_path, tmp_path):
    """So many wait there that the kernel lets nobody else wait."""
    with socket.socket(socket.AF_UNIX) as stopped, ExitStack() as waiting:
        stopped.bind(str(socket_path))
        stopped.listen(0)
        for _ in range(9):
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(str(socket_path))
        with pytest.raises(SettingsError, match="another power daemon listens"):
            Daemon(socket_path, standin.uuids, [0], tmp_path / "clocks")
    assert socket_path.exists()


def test_the_daemon_says_why_it_cannot_listen(standin, tmp_path):
    for path in (tmp_path / ("x" * 200), tmp_path / "no" / "socket"):
        with pytest.raises(SettingsError, match=r"cannot listen at .*: (AF_UNIX path too long|No such file or directory); run it as root"):
            Daemon(path, standin.uuids, [os.getuid()], tmp_path / "root")


def test_the_daemon_removes_nothing_but_a_socket(standin, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("x")
    with pytest.raises(SettingsError, match="it is there, and is no socket"):
        Daemon(kept, standin.uuids, [os.getuid()], tmp_path / "root")
    assert kept.read_text() == "x"


@pytest.mark.long
def test_the_command_serves_until_it_is_told_to_end(standin, socket_path, tmp_path):
    words = [sys.executable, "-m", "elastic.cli.main", "power-daemon", "--user", str(os.getuid()), "--gpu", standin.uuids[0]]
    with subprocess.Popen(words, cwd=HOME, env={**os.environ, ROOT: "1"}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"GPUs {standin.uuids[0]}" in process.stderr.readline()
        process.terminate()
        assert process.wait(20) == 0
    for wrong, why in ((["--user", "nobody-of-this-name"], "no such user"), (["--user", "0", "--gpu", "GPU-0"], "no such GPU")):
        done = subprocess.run([*words[:4], *wrong], cwd=HOME, capture_output=True, text=True)
        assert (done.returncode, why in done.stderr) == (1, True)
