"""Tests workers in separate processes: what a survivor sees when the kernel closes the sockets of a dead worker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from comm_cluster import PATIENCE_S, Cluster, Peer, tag

from elastic.errors import PeerLost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]
DETECTION_S = 1.0
_PEER = Path(__file__).with_name("comm_peer.py")
_ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["unix", "tcp"])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(request.param, [0])
    yield made
    made.close()


@pytest.fixture
def start(cluster: Cluster) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts worker 1 as a process and links worker 0 to it."""
    children: list[subprocess.Popen[str]] = []

    def go(behaviour: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, str(_PEER), "1", cluster.kind, behaviour],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        children.append(child)
        assert child.stdin is not None
        assert child.stdout is not None
        address = child.stdout.readline().strip()
        child.stdin.write(cluster[0].address + "\n")
        child.stdin.flush()
        members = [Peer(0, cluster.host(0), cluster[0].address), Peer(1, cluster.host(1), address)]
        cluster[0].install(1, 0, members, [1], timeout_s=PATIENCE_S)
        return child

    yield go
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with child:
            child.wait()


def joined(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == "joined\n"


def test_a_blocked_receive_sees_a_killed_peer(cluster, start):
    child = start("wait")
    joined(child)
    waiting = cluster.blocked(0, lambda: cluster[0].receive(1, tag()))
    killed = time.monotonic()
    child.kill()
    with pytest.raises(PeerLost, match="worker 1"):
        waiting.result(PATIENCE_S)
    assert time.monotonic() - killed < DETECTION_S


def test_a_computing_worker_hears_of_a_killed_peer(cluster, start):
    child = start("wait")
    joined(child)
    heard: list[float] = []
    cluster[0].on_failure = lambda peer, error: heard.append(time.monotonic())
    child.kill()
    killed = time.monotonic()
    busy = np.ones((64, 64))
    while not heard and time.monotonic() - killed < PATIENCE_S:
        busy = busy @ np.eye(64)
    assert heard[0] - killed < DETECTION_S
    with pytest.raises(PeerLost):
        cluster[0].send(1, tag(), b"")


def test_a_child_of_a_killed_peer_does_not_hide_its_death(cluster, start):
    child = start("fork")
    joined(child)
    waiting = cluster.blocked(0, lambda: cluster[0].receive(1, tag()))
    killed = time.monotonic()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(PeerLost):
        waiting.result(PATIENCE_S)
    assert time.monotonic() - killed < DETECTION_S
    os.killpg(child.pid, 0)  # the grandchild lives, so it could have hidden the death


def test_a_fork_leaves_the_links_of_the_parent_alone(cluster, start):
    child = start("fork_and_answer")
    cluster[0].send(1, tag(), b"echo")
    assert cluster[0].receive(1, tag()).tobytes() == b"echo"
    joined(child)


def test_a_peer_killed_within_a_message_is_lost(cluster, start):
    child = start("half_a_message")
    place = np.zeros(50_000_000, np.uint8)
    cluster[0].post(1, tag(), place)
    with cluster[0]._links[1]._reader:
        cluster[0].send(1, tag(), b"go")
        joined(child)
        child.kill()
        child.wait()
    with pytest.raises(PeerLost):
        cluster[0].receive(1, tag())
    assert place[0] == 1
    assert place[-1] == 0
