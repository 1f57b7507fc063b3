"""Tests hosts that vanish without a word, and networks that split and heal, with network namespaces as hosts."""

from __future__ import annotations

import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.hosts.agents import Cluster, Host, cluster
from tests.hosts.namespaces import Network, etcd_at, network
from tests.hosts.test_hosts import calm

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

STEPS = 240


@pytest.fixture
def apart(leftovers: Any) -> Iterator[tuple[Network, Cluster]]:
    """A network, and a cluster on it."""
    folder = leftovers.directory / "cluster"
    with network(3) as net, etcd_at(net.gateway, folder / "etcd") as etcd, cluster(folder, etcd) as made:
        yield net, made
    shutil.rmtree(folder)


def founded(net: Network, made: Cluster) -> list[Host]:
    """Three hosts that train together."""
    first = made.host(STEPS, {}, 0.08, hosts_min=3, within=net.command(0))
    first.until("waiting for 2 more hosts")
    hosts = [first, *(made.host(STEPS, {}, 0.08, within=net.command(host)) for host in (1, 2))]
    for host in hosts:
        host.has_members()
    return hosts


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_host_whose_cable_is_cut_is_done_without_and_comes_back(apart: tuple[Network, Cluster]) -> None:
    net, made = apart
    hosts = founded(net, made)
    net.cut(2)
    hosts[0].until("it has been silent for 2 s")
    time.sleep(2.0)
    net.heal(2)
    assert [host.result() for host in hosts] == [calm(STEPS)] * 3
    lost, joined = [each for each in hosts[0].incidents if each["kind"] in ("death", "join")][:2]
    assert (lost["kind"], joined["kind"]) == ("death", "join")
    assert re.fullmatch(r"lost with host \S+: it has been silent for 2 s", lost["why"])
    assert 1000 < lost["detected_ms"] < 10_000
    assert [each["kind"] for each in hosts[2].incidents] == [each["kind"] for each in hosts[0].incidents]


def test_the_majority_goes_on_without_the_coordinator_which_comes_back_as_a_joiner(apart: tuple[Network, Cluster]) -> None:
    net, made = apart
    hosts = founded(net, made)
    net.cut(0)
    wait_for(lambda: any("coordinates the job now" in host.said for host in hosts[1:]))
    wait_for(lambda: any("running again" in host.said for host in hosts[1:]))
    net.heal(0)
    assert [host.result() for host in hosts] == [calm(STEPS)] * 3
    assert "a new agent of this host takes part in the job" in hosts[0].said
    lost = next(each for each in hosts[1].incidents if each["kind"] == "death")
    assert re.fullmatch(r"lost with host \S+: it has been silent for 2 s", lost["why"])


def test_a_coordinator_that_is_asked_to_end_while_it_is_cut_off_has_left_when_it_learns_that_others_went_on(
    apart: tuple[Network, Cluster],
) -> None:
    net, made = apart
    hosts = founded(net, made)
    net.cut(0)
    hosts[0].process.send_signal(signal.SIGTERM)
    wait_for(lambda: any("running again" in host.said for host in hosts[1:]))
    net.heal(0)
    assert hosts[0].process.wait(60) == 143, hosts[0].said
    assert "this host leaves the job, which may go on without it: agent" in hosts[0].said
    assert [host.result() for host in hosts[1:]] == [calm(STEPS)] * 2
