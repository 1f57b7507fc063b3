"""Tests hosts that fall silent for a while and come back: what their dead workers have left in memory is offered, or freed."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.agents import Cluster, Host
from tests.hosts.test_hosts import hosts  # noqa: F401  (a fixture)
from tests.hosts.troubles import Job, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(600), pytest.mark.usefixtures("leftovers")]


def agent_of(host: Host) -> int:
    return json.loads((host.directory / "members.json").read_text())["agent"]


def segments(agent: int) -> int:
    """How many segments an agent holds."""
    found = 0
    for each in Path(f"/proc/{agent}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += "memfd:elastic" in str(each.readlink())
    return found


def files_of_the_dead(agent: int) -> list[str]:
    """What an agent has open of processes that have ended: files of /proc, and records of their activity."""
    found = []
    for each in Path(f"/proc/{agent}/fd").iterdir():
        with suppress(FileNotFoundError):
            parts = each.readlink().parts
            process = parts[2] if parts[:2] == ("/", "proc") and parts[2:] and parts[2].isdigit() else None
            found += [str(each.readlink())] if process is not None and not Path(f"/proc/{process}").exists() else []
    return found


def records(agent: int) -> int:
    """How many activity records an agent has open."""
    found = 0
    for each in Path(f"/proc/{agent}/fd").iterdir():
        with suppress(FileNotFoundError):
            found += each.readlink().parent.name == "activity"
    return found


def test_an_agent_keeps_nothing_open_of_workers_that_have_died(hosts: Cluster) -> None:  # noqa: F811
    """Neither the one that coordinates nor another: each death left up to 17 files open on hosts that do not coordinate."""
    job = founded(hosts, 2)
    agents = [agent_of(host) for host in job.hosts]
    for _ in range(2):
        for host in job.hosts:
            before = {each["worker"] for each in job.members(host)}
            job.kill_worker(host)
            wait_for(lambda before=before, host=host: {each["worker"] for each in job.members(host)} - before, *job.hosts)
            job.advance(15)
    for agent in agents:
        wait_for(lambda agent=agent: not files_of_the_dead(agent) and records(agent) == 1, *job.hosts)
    job.ends()


def founded(hosts: Cluster, count: int, **options: Any) -> Job:  # noqa: F811
    job = Job(hosts, options)
    first = job.host(hosts_min=count)
    first.until("waiting for")
    for _ in range(count - 1):
        job.host()
    job.advance(5)
    return job


def test_state_that_only_a_silent_host_has_is_waited_for(hosts: Cluster) -> None:  # noqa: F811
    job = founded(hosts, 3)
    first, second, third = job.hosts
    stopped = agent_of(second)
    os.kill(stopped, signal.SIGSTOP)
    job.kill_agent(third)
    try:
        first.until("Hosts that are silent may have it: the job waits 30 s for them to come back")
    finally:
        os.kill(stopped, signal.SIGCONT)
    wait_for(lambda: len(job.members(first)) == 3, *job.hosts)
    job.advance(5)
    job.ends()
    assert "a new agent of this host takes part" not in second.said


def test_a_host_that_is_back_frees_what_nobody_needs(hosts: Cluster) -> None:  # noqa: F811
    job = founded(hosts, 2)
    first, second = job.hosts
    agent = agent_of(second)
    assert segments(agent) == 1
    os.kill(agent, signal.SIGSTOP)
    wait_for(lambda: len(job.members(first)) == 1, *job.hosts)
    job.advance(5)
    os.kill(agent, signal.SIGCONT)
    wait_for(lambda: len(job.members(first)) == 2, *job.hosts)
    job.advance(5)
    assert agent_of(second) == agent
    wait_for(lambda: segments(agent) == 1, *job.hosts)
    job.ends()


def test_memory_of_who_died_before_the_coordinator_was_lost_is_freed(hosts: Cluster) -> None:  # noqa: F811
    """The coordinator is lost after the view without the dead worker is committed, and before that view's first step, which takes long."""
    first = hosts.host(10_000, {}, 1.0, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(10_000, {}, 1.0)
    second.has_members()
    known = json.loads((second.directory / "members.json").read_text())
    agent = agent_of(second)
    assert segments(agent) == 2
    victim = next(each for each in known["members"] if each["worker"] == max(member["worker"] for member in known["members"]))
    os.kill(victim["pid"], signal.SIGKILL)

    def replaced() -> bool:
        members = [each["worker"] for each in json.loads((second.directory / "members.json").read_text())["members"]]
        return len(members) == 2 and max(members) > victim["worker"]

    wait_for(lambda: json.loads((first.directory / "members.json").read_text())["epoch"] == 2, first, second)
    os.kill(agent_of(first), signal.SIGKILL)
    first.process.kill()
    second.until("coordinates the job now")
    wait_for(lambda: replaced() and segments(agent) == 2, second)
