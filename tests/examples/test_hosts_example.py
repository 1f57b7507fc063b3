"""Tests the example of several hosts: its proxies really cut, it finds what the job does not name, and all of it gets through."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.observe.incident import Incident

EXAMPLES = Path(__file__).parents[2] / "examples"
_ECHO = "import socket, sys; s = socket.create_connection(('127.0.1.2', int(sys.argv[1]))); print('there', flush=True); "
_ECHO += "[(s.sendall(line.encode()), print(s.recv(9).decode(), flush=True)) for line in iter(sys.stdin.readline, '')]"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Returns a function that imports a module of the examples."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("hosts", "hosts_events", "hosts_cluster", "etcd_members", "gpt"):
        sys.modules.pop(name, None)


def echo(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        while data := sock.recv(9):
            sock.sendall(data)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1])
def test_a_cut_cable_passes_nothing_on_and_closes_nothing(example: Any, cut: int) -> None:
    """Neither if the host's own cable is cut nor if the other one's is; when it is mended, what was on the way arrives."""
    proxies = importlib.import_module("elastic.chaos.proxies").Proxies(3)
    proxies.make()
    with socket.create_server(("127.0.1.2", 0)) as listener:
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        command = [sys.executable, "-c", _ECHO, str(listener.getsockname()[1])]
        environment = {**os.environ, **proxies.environment(0)}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment) as host:
            assert host.stdin is not None
            assert host.stdout is not None
            out = host.stdout
            answers: list[str] = []
            thread = threading.Thread(target=lambda: answers.extend(iter(out.readline, "")))
            assert host.stdout.readline() == "there\n"
            host.stdin.write("before\n")
            assert [host.stdout.readline(), host.stdout.readline()] == ["before\n", "\n"]
            proxies.cut(cut)
            proxies.cut(2)
            host.stdin.write("between\n")
            thread.start()
            thread.join(0.5)
            assert (answers, host.poll()) == ([], None)
            proxies.heal(cut)
            host.stdin.close()
            thread.join(10.0)
            assert answers == ["between\n", "\n"]
    proxies.remove()


class FakeCluster:
    """A cluster whose job has recorded these incidents, and records no others."""

    def __init__(self, *incidents: Incident) -> None:
        self.incidents = [each.to_json() for each in incidents]

    def say(self, text: str) -> None: ...

    def settle(self) -> None: ...

    def until(self, what: str, met: Any) -> Any:
        if not (found := met()):
            raise RuntimeError(what)
        return found


DEATH = Incident(kind="death", worker=2, also=(3,), why="lost with host b: it has been silent for 2 s")
STEPS = [{"loss": 2.0}, {"loss": 1.5}]


@pytest.mark.parametrize(
    ("recorded", "workers", "steps", "digest", "good"),
    [
        ([DEATH], {2, 3}, STEPS, "d", True),
        ([DEATH, Incident(kind="rebalance", why="worker 1 takes 1.3 times as long as others")], {2, 3}, STEPS, "d", True),
        ([], {2, 3}, STEPS, "d", False),
        ([DEATH], {1, 2}, STEPS, "d", False),
        ([Incident(kind="death", worker=2, also=(3,))], {2, 3}, STEPS, "d", False),
        ([DEATH, Incident(kind="eviction", worker=5, cause="hung")], {2, 3}, STEPS, "d", False),
        ([DEATH], {2, 3}, STEPS[:1], "d", False),
        ([DEATH], {2, 3}, [STEPS[0], {"loss": 1.25}], "d", False),
        ([DEATH], {2, 3}, STEPS, "e", False),
        ([DEATH, Incident(kind="damage", step=2, went_back_to=0)], {2, 3}, [STEPS[0], {"loss": 1.25}], "d", True),
        ([DEATH, Incident(kind="damage", step=2, went_back_to=1)], {2, 3}, [STEPS[0], {"loss": 1.25}], "d", False),
    ],
)
def test_whatever_is_not_as_it_should_be_is_found(
    example: Any, recorded: list[Incident], workers: set[int], steps: list[Any], digest: str, good: bool
) -> None:
    events, hosts = example("hosts_events"), example("hosts")
    happening = events.Happening(FakeCluster(*recorded), seed=0)
    with happening.event("something"):
        happening.expect("deaths", events.death("it has been silent"), workers)
        if any(each.kind == "damage" for each in recorded):
            happening.expect("damage", lambda each: each["kind"] == "damage")
    assert hosts.compare(happening, digest, steps, ("d", STEPS)) is good


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("options", [[], ["--proxies"]])
def test_everything_happens_and_nothing_changes(options: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / "hosts.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "digests EQUAL" in done.stdout
