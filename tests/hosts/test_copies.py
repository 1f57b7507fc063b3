"""Tests jobs of three hosts that keep another number of copies than two: two hosts are lost at once, agents and workers together."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.hosts.agents import Cluster, Host
from tests.hosts.test_hosts import calm, hosts  # noqa: F401  (a fixture)
from tests.hosts.test_racks import members_of
from tests.hosts.test_requests import asked, status

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300), pytest.mark.usefixtures("leftovers")]

STEPS = 150


def three(hosts: Cluster, copies: int) -> list[Host]:  # noqa: F811
    started = [hosts.host(STEPS, {}, 0.05, workers=2, hosts_min=3, copies=copies)]
    started[0].until("waiting for 2 more hosts")
    started += [hosts.host(STEPS, {}, 0.05, workers=2) for _ in range(2)]
    for host in started:
        host.has_members()
    return started


def lose(victims: list[Host]) -> list[int]:
    """Kills hosts: their workers and agents at the same moment, and their launchers. Returns the workers."""
    told = [members_of(host) for host in victims]
    own = [member for each in told for member in each["members"] if parent(member["pid"]) == each["forkserver"]]
    for host in victims:
        os.kill(host.process.pid, signal.SIGSTOP)  # a launcher that runs would start another agent
    for process in (*(member["pid"] for member in own), *(each["agent"] for each in told)):
        with suppress(ProcessLookupError):  # a worker dies with its agent
            os.kill(process, signal.SIGKILL)
    for host in victims:
        host.process.kill()
    return sorted(member["worker"] for member in own)


def stop(hosts: Cluster) -> None:  # noqa: F811
    """Stops the job, and waits until its hosts have ended: they write into their directories until then."""
    asked(hosts, "stop", "job")
    for host in hosts.started:
        host.process.wait(60)


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.parametrize("left", [0, 2], ids=["the coordinator is left", "another agent takes over"])
def test_with_three_copies_any_two_hosts_may_be_lost_at_once(hosts: Cluster, left: int) -> None:  # noqa: F811
    started = three(hosts, copies=3)
    shown = status(hosts)
    assert (shown["copies"], shown["copies_kept"], shown["copies_wanted"]) == ("other hosts", 3, 3)
    assert "further copies of the state (3 copies in all): each on another host, and" in asked(hosts, "status", "job").stdout
    survivor = started[left]
    gone = lose([host for host in started if host is not survivor])
    assert len(gone) == 4
    survivor.until("there is 1 host, so there is 1 copy of the state instead of copies=3")
    shown = status(hosts)
    assert (shown["copies_kept"], shown["copies_wanted"]) == (1, 3)
    assert survivor.result(120) == calm(STEPS)
    deaths = [incident for incident in survivor.incidents if incident["kind"] == "death"]
    assert sorted({worker for death in deaths for worker in (death["worker"], *death["also"])}) == gone
    assert all(incident["restored"] is None for incident in survivor.incidents), "no checkpoint was read"


def test_with_two_copies_the_same_loss_is_the_end_and_says_what_is_lost(hosts: Cluster) -> None:  # noqa: F811
    started = three(hosts, copies=2)
    lose(started[1:])
    said = started[0].failure(75)
    assert re.search(r"no surviving worker has a full copy of layer \d+ \[\d+, \d+\)", said)
    assert "more workers were lost at once than there are copies" in said


def test_copies_come_back_with_a_host(hosts: Cluster) -> None:  # noqa: F811
    """Founded by one host; each that joins gets copies. A job says when it has fewer than it wants, and when it has them all."""
    first = hosts.host(100_000, {}, 0.05, workers=1, copies=3)
    first.until("there is 1 host, so there is 1 copy of the state instead of copies=3")
    hosts.host(100_000, {}, 0.05, workers=1, copies=3)
    first.until("there are 2 hosts, so there are 2 copies of the state instead of copies=3")
    assert "(2 copies in all, and 3 are wanted)" in asked(hosts, "status", "job").stdout
    hosts.host(100_000, {}, 0.05, workers=1)
    first.until("there are 3 copies of the state again")
    assert json.loads(asked(hosts, "status", "job", "--json").stdout)["copies_kept"] == 3
    stop(hosts)


def test_a_host_that_wants_another_number_of_copies_is_refused(hosts: Cluster) -> None:  # noqa: F811
    first = hosts.host(100_000, {}, 0.05, workers=1, copies=3)
    first.has_members()
    assert "copies" in (said := hosts.host(100_000, {}, 0.05, workers=1, copies=4).failure(2)), said
    assert re.search(r"copies=?.* 4.* 3|copies=?.* 3.* 4|copies.*3.*4|copies.*4.*3", said), said
    stop(hosts)


@pytest.mark.parametrize("bad", [0, -1, 1000])
def test_a_bad_number_of_copies_is_refused_before_anything_starts(hosts: Cluster, bad: int) -> None:  # noqa: F811
    assert f"copies={bad}: use a whole number from 1" in hosts.host(1, copies=bad).failure(2)
