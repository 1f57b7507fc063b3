"""Tests spares of jobs of several hosts: of a lost host, of the coordinator's, of a drained one; and in `elastic status` and `scale`."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.hosts.agents import Cluster, Host
from tests.hosts.test_hosts import calm, hosts  # noqa: F401  (a fixture)
from tests.hosts.test_requests import asked, status
from tests.recovery.sparing import waits

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

STEPS = 200


def two(made: Cluster) -> tuple[Host, Host]:
    """Two hosts with two members and a spare each; the first coordinates, and spares are 4 on the first and 5 on the second."""
    first = made.host(STEPS, {}, 0.05, hosts_min=2, spares=1)
    first.until("waiting for 1 more host")
    second = made.host(STEPS, {}, 0.05, spares=1)
    deadline = time.monotonic() + 60.0
    while not (waits(str(first.directory), 4) and waits(str(second.directory), 5)):
        assert time.monotonic() < deadline, first.said + second.said
        time.sleep(0.02)
    time.sleep(0.3)
    return first, second


def kill_agent(host: Host) -> None:
    """Kills the agent of a host; its workers end with it."""
    import json

    os.kill(json.loads((host.directory / "members.json").read_text())["agent"], signal.SIGKILL)


@pytest.mark.parametrize("lost", [0, 1])
def test_the_spare_of_the_other_host_replaces_a_worker_of_a_lost_one(hosts: Cluster, lost: int) -> None:  # noqa: F811
    """The coordinator's host too. It comes back, since its launcher starts another agent, and gets its members back."""
    both = two(hosts)
    kill_agent(both[lost])
    assert both[1 - lost].result() == both[lost].result() == calm(STEPS)
    first, *later = both[1 - lost].incidents
    dead, spare = ([0, 1], 5) if lost == 0 else ([2, 3], 4)
    assert (first["kind"], sorted([first["worker"], *first["also"]]), first["joined"], first["spares"]) == ("death", dead, [spare], [spare])
    assert any(each["joined"] for each in later), both[1 - lost].said
    last = both[1 - lost].incidents[-1]
    assert last["layout_after"].endswith("x4")


def test_a_spare_takes_the_place_of_a_drained_host_and_status_and_scale_know_spares(hosts: Cluster) -> None:  # noqa: F811
    first, second = two(hosts)
    told = status(hosts)
    assert [(host["workers"], host["spares"]) for host in told["hosts"]] == [([0, 1], [4]), ([2, 3], [5])]
    assert "spares" in asked(hosts, "status", "job").stdout
    refused = asked(hosts, "scale", "job", "7").stderr
    assert refused == "error: 7 workers: the hosts have room for 6, of which 2 are spares, and the job needs 1\n"
    assert asked(hosts, "scale", "job", "5").returncode == 0
    _until(hosts, 5)
    assert asked(hosts, "scale", "job", "4").returncode == 0
    _until(hosts, 4)
    name = told["hosts"][1]["name"]
    assert asked(hosts, "drain", "job", name).returncode == 0
    assert second.process.wait(60) == 130, second.said
    assert _until(hosts, 3)["hosts"][0]["spares"] == []
    assert first.result() == calm(STEPS)
    assert [each["kind"] for each in first.incidents] == ["join", "drain", "drain"]
    assert first.incidents[0]["spares"] == first.incidents[0]["joined"]
    assert all(each["steps_redone"] == 0 for each in first.incidents)


def _until(made: Cluster, members: int) -> dict:  # type: ignore[type-arg]
    deadline = time.monotonic() + 60.0
    while True:
        told = status(made)
        if sum(len(host["workers"]) for host in told["hosts"]) == members and told["phase"] == "running":
            return told
        assert time.monotonic() < deadline, told
