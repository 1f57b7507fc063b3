"""Tests a job whose hosts stand in two racks, of which one is lost: both its hosts at once, with agents, launchers and workers."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from tests.hosts.agents import Cluster, Host
from tests.hosts.test_hosts import calm, hosts  # noqa: F401  (a fixture)
from tests.hosts.test_requests import asked, status

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

STEPS = 150


def members_of(host: Host) -> dict[str, Any]:
    return json.loads((host.directory / "members.json").read_text())


@pytest.mark.parametrize("lost", ["north", "south"])
def test_a_rack_that_is_lost_as_a_whole_takes_no_state_with_it(hosts: Cluster, lost: str) -> None:  # noqa: F811
    """The coordinator stands in the north; the order of hosts is such that a copy on the next host would be in the same rack."""
    racks = ["north", "north", "south", "south"]
    started = [hosts.host(STEPS, {}, 0.05, workers=1, hosts_min=4, rack=racks[0])]
    started[0].until("waiting for 3 more hosts")
    started += [hosts.host(STEPS, {}, 0.05, workers=1, rack=rack) for rack in racks[1:]]
    for host in started:
        host.has_members()
    told = members_of(started[0])
    assert (sorted(told["racks"].values()), told["copies"]) == (racks, "other racks")
    shown = status(hosts)
    assert (sorted(host["rack"] for host in shown["hosts"]), shown["copies"]) == (racks, "other racks")
    victims = [host for host, rack in zip(started, racks, strict=True) if rack == lost]
    agents = [members_of(host)["agent"] for host in victims]
    for host in victims:
        os.kill(host.process.pid, signal.SIGSTOP)  # a launcher that runs would start another agent
    for agent in agents:
        os.kill(agent, signal.SIGKILL)
    for host in victims:
        host.process.kill()
    left = [host for host in started if host not in victims]
    assert [host.result() for host in left] == [calm(STEPS)] * 2
    deaths = [incident for incident in left[0].incidents if incident["kind"] == "death"]
    gone = {worker for death in deaths for worker in (death["worker"], *death["also"])}
    assert len(gone) == 2
    assert all(incident["restored"] is None for incident in deaths)


def test_status_shows_racks_and_where_copies_are(hosts: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("ELASTIC_RACK", "hall-1/7")
    first = hosts.host(100_000, {}, 0.05, workers=1, hosts_min=2)
    first.until("waiting for 1 more host")
    hosts.host(100_000, {}, 0.05, workers=1, rack="hall-1/7")
    first.has_members()
    shown = asked(hosts, "status", "job").stdout
    assert shown.count("hall-1/7") == 2
    assert "second copies of the state: each on another host" in shown
    third = hosts.host(100_000, {}, 0.05, workers=1, rack="hall-2/1")
    third.has_members()
    assert "second copies of the state: each in another rack" in asked(hosts, "status", "job").stdout
    asked(hosts, "stop", "job")


def test_a_bad_rack_is_refused_before_anything_starts(hosts: Cluster) -> None:  # noqa: F811
    assert "rack='' is no name of a rack" in hosts.host(1, rack="").failure(2)
    assert "rack='a b' is no name of a rack" in hosts.host(1, rack="a b").failure(2)
