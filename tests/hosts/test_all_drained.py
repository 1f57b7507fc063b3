"""Tests that a job stops, is saved, and all its agents exit as after a stop, when all its hosts get SIGTERM, in any order and delay."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.hosts.agents import SCRIPT, Cluster, Host, cluster

pytestmark = [pytest.mark.slow, pytest.mark.long]

PAUSE_S = 0.05
TERMINATED = 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with cluster(tmp_path_factory.mktemp("etcd")) as own:
        yield own.etcd


@pytest.fixture
def hosts(leftovers: Any, etcd: str) -> Iterator[Cluster]:
    with cluster(leftovers.directory / "cluster", etcd) as made:
        yield made
    shutil.rmtree(made.folder)


def founded(hosts: Cluster, number: int, job: str) -> list[Host]:
    """So many hosts that train together; the first one coordinates."""
    args, options = (str(hosts.folder / "saved"), PAUSE_S), {"workers": 1, "job": job, "target": f"{SCRIPT}:saves"}
    first = hosts.host(*args, hosts_min=number, **options)
    first.until("waiting for")
    started = [first, *(hosts.host(*args, **options) for _ in range(number - 1))]
    for host in started:
        host.has_members()
    return started


def terminate(started: Sequence[Host], order: Sequence[int], delay_s: float) -> None:
    """Sends SIGTERM to the hosts in this order. The delays are what is tested."""
    for place, number in enumerate(order):
        time.sleep(delay_s if place else 0.0)
        started[number].process.send_signal(signal.SIGTERM)
    for host in started:
        assert host.process.wait(60) == TERMINATED, "\n".join(each.said for each in started)


def is_saved(hosts: Cluster) -> bool:
    return any((hosts.folder / "saved").iterdir())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_two_hosts_get_sigterm(hosts: Cluster, order: tuple[int, ...], delay_s: float) -> None:
    terminate(founded(hosts, 2, f"two-{order[0]}-{delay_s}"), order, delay_s)
    assert is_saved(hosts)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_three_hosts_get_sigterm(hosts: Cluster, order: tuple[int, ...], delay_s: float) -> None:
    terminate(founded(hosts, 3, f"three-{''.join(map(str, order))}-{delay_s}"), order, delay_s)
    assert is_saved(hosts)


@pytest.mark.parametrize("delay_s", [0.0, 0.3])
def test_the_successor_gets_sigterm_while_it_takes_over_and_the_third_host_goes_on(hosts: Cluster, delay_s: float) -> None:
    started = founded(hosts, 3, f"successor-{delay_s}")
    os.kill(json.loads((started[0].directory / "members.json").read_text())["agent"], signal.SIGKILL)
    successor, third = started[1:]
    while "coordinates the job now" not in successor.said:
        successor, third = third, successor
        assert successor.process.poll() is None, successor.said
        time.sleep(0.01)
    time.sleep(delay_s)
    successor.process.send_signal(signal.SIGTERM)
    assert successor.process.wait(60) == TERMINATED, successor.said
    third.until("coordinates the job now")
    third.process.send_signal(signal.SIGTERM)
    assert third.process.wait(60) == TERMINATED, third.said
    assert is_saved(hosts)
