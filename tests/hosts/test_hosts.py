"""Tests jobs of several hosts: agents with TCP links between them that found a job, are lost, take over, come back and are refused."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import elastic
from tests.hosts import script
from tests.hosts.agents import SCRIPT, Cluster, cluster

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 24


@functools.cache
def calm(steps: int = STEPS) -> Any:
    """What an undisturbed job of one worker returns."""
    return elastic.run(script.train, workers=1, args=[steps]).value


@pytest.fixture
def hosts(leftovers: Any, tmp_path: Path) -> Iterator[Cluster]:
    with cluster(leftovers.directory / "cluster") as made:
        yield made
    shutil.rmtree(made.folder)


def test_two_hosts_train_as_one(hosts: Cluster) -> None:
    first = hosts.host(STEPS, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(STEPS, workers=1)
    assert first.result() == second.result() == calm()


@pytest.mark.long
def test_a_lost_host_is_done_without_and_its_new_agent_joins(hosts: Cluster) -> None:
    """The agent is killed; its launcher starts another one."""
    fates = {"6": [2, "agent"]}
    first = hosts.host(STEPS * 4, fates, 0.05, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(STEPS * 4, fates, 0.05)
    assert first.result() == calm(STEPS * 4)
    assert second.result() == calm(STEPS * 4)
    lost, joined = first.incidents[:2]
    assert (lost["kind"], sorted([lost["worker"], *lost["also"]]), joined["kind"]) == ("death", [2, 3], "join")
    assert re.fullmatch(r"lost with host \S+: its connection ended", lost["why"])
    assert first.incidents == second.incidents
    assert re.search(r"worker 2 \(process \d+\) was lost in epoch 1, step \d+ with its host \S+: its connection ended", first.said)
    assert "a new agent of this host takes part" in second.said


def test_another_agent_coordinates_when_the_first_is_lost(hosts: Cluster) -> None:
    fates = {"6": [0, "agent"]}
    first = hosts.host(STEPS * 4, fates, 0.05, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(STEPS * 4, fates, 0.05)
    assert second.result() == calm(STEPS * 4)
    assert first.result() == calm(STEPS * 4)
    lost = second.incidents[0]
    assert (lost["kind"], sorted([lost["worker"], *lost["also"]])) == ("death", [0, 1])
    assert re.fullmatch(r"lost with host \S+: its connection ended", lost["why"])
    assert "coordinates the job now" in second.said


@pytest.mark.long
@pytest.mark.parametrize(("lost", "others"), [(2, [0, 1]), (0, [2, 3])])
def test_a_host_is_lost_when_the_others_have_returned(hosts: Cluster, lost: int, others: list[int]) -> None:
    """The job has ended well, also if that host coordinated it and had the first member. Its new agent finds that out."""
    fates = {"end": [lost, str(hosts.folder / "returning"), others]}
    both = [hosts.host(STEPS, fates, hosts_min=2)]
    both[0].until("waiting for 1 more host")
    both.append(hosts.host(STEPS, fates))
    assert both[0].result() == both[1].result() == calm()
    assert ("The job's value is that of worker 2" in both[1].said) == (lost == 0)


@pytest.mark.long
def test_the_first_member_is_lost_when_the_others_have_returned(hosts: Cluster) -> None:
    fates = {"end": [0, str(hosts.folder / "returning"), [1, 2, 3], "worker"]}
    both = [hosts.host(STEPS, fates, hosts_min=2)]
    both[0].until("waiting for 1 more host")
    both.append(hosts.host(STEPS, fates))
    assert both[0].result() == both[1].result() == calm()
    assert "The job's value is that of worker 1" in both[0].said


@pytest.mark.long
def test_a_host_that_stood_still_while_the_job_ended_hears_how(hosts: Cluster) -> None:
    first = hosts.host(STEPS * 2, {}, 0.05, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(STEPS * 2, {}, 0.05)
    second.has_members()
    agent = json.loads((second.directory / "members.json").read_text())["agent"]
    os.kill(agent, signal.SIGSTOP)
    try:
        assert first.result() == calm(STEPS * 2)
    finally:
        os.kill(agent, signal.SIGCONT)
    assert second.result() == calm(STEPS * 2)


@pytest.mark.long
def test_a_host_may_join_a_running_job(hosts: Cluster) -> None:
    first = hosts.host(STEPS * 4, {}, 0.05, workers=1)
    first.until("")
    second = hosts.host(STEPS * 4, {}, 0.05)
    assert first.result() == second.result() == calm(STEPS * 4)
    assert [each["kind"] for each in first.incidents][:1] == ["join"]


@pytest.mark.long
def test_a_worker_that_dies_is_replaced_on_its_host(hosts: Cluster) -> None:
    fates = {"6": [2, "worker"]}
    first = hosts.host(STEPS * 4, fates, 0.05, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(STEPS * 4, fates, 0.05)
    assert first.result() == second.result() == calm(STEPS * 4)
    assert [each["kind"] for each in first.incidents][:2] == ["death", "join"]


@pytest.mark.long
@pytest.mark.parametrize("dead", [(1, 2, 3), (0, 1, 2, 3)])
def test_what_workers_leave_in_memory_on_a_host_without_any_other_is_fetched(hosts: Cluster, dead: tuple[int, ...]) -> None:
    first = hosts.host(STEPS * 4, {}, 0.05, hosts_min=2)
    first.until("waiting for 1 more host")
    second = hosts.host(STEPS * 4, {}, 0.05)
    for host in (first, second):
        host.has_members()
    members = json.loads((first.directory / "members.json").read_text())["members"]
    for member in members:
        if member["worker"] in dead:
            os.kill(member["pid"], signal.SIGKILL)
    result, undisturbed = first.result(), calm(STEPS * 4)
    begun = result["losses"][0][0]  # by a new process of the first member, if it died
    assert (begun > 0) == (0 in dead)
    assert result == second.result() == {**undisturbed, "losses": undisturbed["losses"][begun:]}
    assert {incident["kind"] for incident in first.incidents} >= {"death"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"seed": 5}, "it was started with seed=5, and the job has seed=0: give the same, or leave it out"),
        ({"target": f"{SCRIPT}:WIDTH"}, "it was started for script.py:WIDTH, and the job runs script.py:train"),
        ({"secret": "another secret of many letters"}, "the agent that coordinates it has another secret"),
    ],
)
def test_who_does_not_fit_is_refused_with_the_reason(hosts: Cluster, options: dict[str, Any], why: str) -> None:
    first = hosts.host(STEPS, hosts_min=2)
    first.until("waiting for 1 more host")
    if "secret" in options:
        options = {"secret": hosts.secret(options["secret"])}
    assert why in hosts.host(STEPS, **options).failure(2)
    second = hosts.host(STEPS)
    assert first.result() == second.result() == calm()


@pytest.mark.long
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_host_that_is_asked_to_end_while_a_new_worker_starts_there_leaves_too(hosts: Cluster, leaver: int) -> None:
    """The new worker must not become a member on a host that is leaving."""
    both = [hosts.host(STEPS * 4, {}, 0.05, hosts_min=2)]
    both[0].until("waiting for 1 more host")
    both.append(hosts.host(STEPS * 4, {}, 0.05))
    for host in both:
        host.has_members()
    known = json.loads((both[leaver].directory / "members.json").read_text())["members"]
    victim = next(each for each in known if each["worker"] // 2 == leaver)
    os.kill(victim["pid"], signal.SIGSTOP)
    both[0].until("was evicted")  # another worker is started in its place
    both[leaver].process.send_signal(signal.SIGTERM)
    assert both[leaver].process.wait(30) == 128 + signal.SIGTERM, both[leaver].said
    stays = both[1 - leaver]
    assert stays.result() == calm(STEPS * 4)
    changes = [each for each in stays.incidents if each["kind"] != "rebalance"]
    assert [(each["kind"], each["joined"]) for each in changes] == [("eviction", []), ("drain", [])]
    assert changes[1]["steps_redone"] == 0


@pytest.mark.long
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_host_that_is_asked_to_end_hands_over_what_it_owns_and_no_step_is_taken_again(hosts: Cluster, leaver: int) -> None:
    """The coordinator's host too: another agent goes on, and no worker of the others notices."""
    both = [hosts.host(STEPS * 4, {}, 0.05, hosts_min=2)]
    both[0].until("waiting for 1 more host")
    both.append(hosts.host(STEPS * 4, {}, 0.05))
    for host in both:
        host.has_members()
    both[leaver].process.send_signal(signal.SIGTERM)
    assert both[leaver].process.wait(30) == 128 + signal.SIGTERM, both[leaver].said
    stays = both[1 - leaver]
    assert stays.result() == calm(STEPS * 4)
    assert [(each["kind"], each["steps_redone"], each["micro_batches_kept"]) for each in stays.incidents] == [("drain", 0, 0)]
    assert "is drained" in stays.incidents[0]["why"]
    assert "is lost" not in stays.said.replace("if this host is lost, the job goes on from a checkpoint", "")
    assert ("has left: this host" in stays.said) == (leaver == 0)
