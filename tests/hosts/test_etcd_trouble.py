"""Tests jobs of several hosts whose etcd is in trouble: they train on, changes of members wait for it with a line, and then happen."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.etcd_access import EtcdClient, EtcdEndpoint, enable_auth
from tests.etcd_cluster import Cluster as Etcd
from tests.etcd_cluster import cluster as etcd_cluster
from tests.hosts import troubles
from tests.hosts.agents import Host, cluster
from tests.hosts.slow import proxy
from tests.hosts.troubles import Job, Trouble, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("leftovers")]

PART = "this host's part in the job waits for it"
RECOVERY = "the recovery waits for it"


@pytest.fixture
def place(leftovers: Any) -> Iterator[tuple[Path, ExitStack]]:
    """A folder, and a stack for what must end with the test."""
    folder = leftovers.directory / "cluster"
    with ExitStack() as stack:
        yield folder, stack
    shutil.rmtree(folder, ignore_errors=True)


def coordinator(etcd: Etcd) -> str:
    """The agent that coordinates the job, as etcd knows it."""
    client = EtcdClient(EtcdEndpoint.parse(etcd.addresses))
    (found,) = [entry.value for entry in client.get_prefix("/elastic/job/") if entry.key.endswith("/coordinator")]
    client.close()
    return json.loads(found or "")["agent"]


def changes_wait(job: Job, trouble: Trouble) -> None:
    """Trains through the trouble; a host that is to join meanwhile, and a worker that is killed before it ends, wait for it."""
    first, second = job.founded()
    began = time.monotonic()
    trouble.begin()
    job.advance()
    third = job.host()
    if trouble.said is not None:
        third.until(PART)
        assert trouble.said in third.said
    while time.monotonic() - began < trouble.seconds:
        job.advance(5)
    job.advance()
    assert "death" not in job.kinds(), "no host is lost that lives"
    killed = job.kill_worker(second)
    if trouble.said is not None:
        first.until(RECOVERY)
        step = job.step
        assert job.kinds().count("death") == 0
        trouble.end()
        job.advance(5)
        assert job.step > step
    wait_for(lambda: "death" in job.kinds(), *job.hosts)
    if trouble.said is None:
        trouble.end()
    wait_for(lambda: len(job.members(first)) == 3 and (third.directory / "members.json").exists(), *job.hosts)
    job.advance(5)
    (dead,) = [each for each in first.incidents if each["kind"] == "death"]
    assert (dead["worker"], dead["also"]) == (killed, [])
    job.ends()
    for host in job.hosts:
        assert "coordinates the job now" not in host.said


def one_etcd(place: tuple[Path, ExitStack], members: int = 1, **options: Any) -> tuple[Etcd, Job]:
    folder, stack = place
    folder.mkdir()
    etcd = stack.enter_context(etcd_cluster(folder / "etcd", members))
    return etcd, Job(stack.enter_context(cluster(folder, etcd.addresses)), options)


TROUBLES: dict[str, Callable[[Etcd], Trouble]] = {
    "restart": lambda etcd: troubles.down(etcd, 2.0),
    "still": troubles.still,
    "full": troubles.full,
    "empty": lambda etcd: troubles.down(etcd, empty=True),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", TROUBLES)
def test_training_goes_on_and_changes_wait(place: tuple[Path, ExitStack], kind: str) -> None:
    etcd, job = one_etcd(place)
    changes_wait(job, TROUBLES[kind](etcd))


@pytest.mark.long
@pytest.mark.parametrize("member", [0, 1])
def test_one_of_three_members_is_lost_and_nothing_waits(place: tuple[Path, ExitStack], member: int) -> None:
    etcd, job = one_etcd(place, 3)
    changes_wait(job, troubles.one_lost(etcd, member))


@pytest.mark.long
@pytest.mark.parametrize("how", [troubles.down, troubles.still])
def test_all_members_are_away_for_a_minute_and_the_same_agent_coordinates_after_it(
    place: tuple[Path, ExitStack], how: Callable[..., Trouble]
) -> None:
    etcd, job = one_etcd(place, 3)
    first, second = job.founded()
    before, trouble = coordinator(etcd), how(etcd, 60.0)
    trouble.begin()
    began = time.monotonic()
    while time.monotonic() - began < trouble.seconds:
        job.advance(5)
    for host in (first, second):
        assert host.said.count("training continues") == 1
    trouble.end()
    for host in (first, second):
        host.until("etcd is back")
    wait_for(lambda: coordinator(etcd) == before)
    assert job.kinds() == []
    job.kill_worker(second)
    wait_for(lambda: job.kinds()[:2] == ["death", "join"], *job.hosts)
    job.ends()


@pytest.mark.long
def test_an_etcd_that_answers_late_delays_changes_and_no_lease_runs_out_for_long(place: tuple[Path, ExitStack]) -> None:
    folder, stack = place
    folder.mkdir()
    etcd = stack.enter_context(etcd_cluster(folder / "etcd"))
    late = stack.enter_context(proxy(etcd.ports[0]))
    job = Job(stack.enter_context(cluster(folder, f"127.0.0.1:{late.port}")))
    changes_wait(job, troubles.slow(late, 30.0))


@pytest.mark.long
def test_a_job_is_founded_at_an_etcd_that_answers_late(place: tuple[Path, ExitStack]) -> None:
    folder, stack = place
    folder.mkdir()
    etcd = stack.enter_context(etcd_cluster(folder / "etcd"))
    late = stack.enter_context(proxy(etcd.ports[0]))
    job = Job(stack.enter_context(cluster(folder, f"127.0.0.1:{late.port}")))
    trouble = troubles.slow(late)
    trouble.begin()
    job.founded()
    keys: list[set[str]] = []
    client = EtcdClient(EtcdEndpoint.parse(etcd.addresses))
    while len(keys) < 100:
        keys.append({entry.key.rpartition("/")[0].rpartition("/")[2] for entry in client.get_prefix("/elastic/job/")})
        time.sleep(0.1)
    client.close()
    assert all("agents" in each for each in keys), "leases are kept"
    trouble.end()
    job.ends()


@pytest.mark.long
def test_a_password_is_changed(place: tuple[Path, ExitStack]) -> None:
    folder, stack = place
    folder.mkdir()
    etcd = stack.enter_context(etcd_cluster(folder / "etcd"))
    enable_auth(EtcdEndpoint.parse(etcd.addresses), "the-old-one")
    file = folder / "password"
    file.touch(0o600)
    file.write_text("the-old-one")
    made = stack.enter_context(cluster(folder, f"root@{etcd.addresses}"))
    job = Job(made, {"etcd_password_file": file})
    first, second = job.founded()
    trouble = troubles.password(etcd, file, "the-old-one", "the-new-one")
    trouble.begin()
    job.advance()
    assert "authentication failed" in job.host().failure(), "for a new agent it is a permanent refusal"
    job.hosts.pop()
    job.kill_worker(second)
    first.until(RECOVERY)
    assert str(trouble.said) in first.said
    trouble.end()
    wait_for(lambda: job.kinds()[:2] == ["death", "join"], *job.hosts)
    job.ends()


@pytest.mark.long
def test_agents_that_are_started_before_etcd_found_the_job_when_it_is_there(place: tuple[Path, ExitStack]) -> None:
    etcd, job = one_etcd(place)
    etcd.kill()
    first, second = job.host(hosts_min=2), job.host(hosts_min=2)
    for host in (first, second):
        wait_for(lambda host=host: host.said.count(PART) == 2, *job.hosts)
        assert "s by now; it gives up after 600 s" in host.said
        assert "check that it runs, and that this is its client port" in host.said
    etcd.start()
    job.advance()
    job.ends()
    for host in (first, second):
        assert "etcd answers again" in host.said


@pytest.mark.long
def test_etcd_goes_away_while_the_job_is_founded(place: tuple[Path, ExitStack]) -> None:
    etcd, job = one_etcd(place)
    first = job.host(hosts_min=2)
    first.until("waiting for 1 more host")
    second = job.host(hosts_min=2)
    first.until("is there with room for 1 worker")
    etcd.kill()
    first.until("the first step waits for it")
    assert job.step == 0
    time.sleep(5.0)  # longer than any lease
    etcd.start()
    job.advance()
    job.ends()
    assert "is lost" not in second.said


def loses_coordinator_and_etcd(etcd: Etcd, job: Job) -> tuple[Host, Host]:
    first, second = job.founded()
    etcd.kill()
    job.kill_agent(first)
    second.until("the search for the agent that coordinates the job waits for it")
    return first, second


@pytest.mark.parametrize("how", ["restart", "empty", "killed"])
@pytest.mark.long
def test_the_coordinator_is_lost_while_etcd_is_away(place: tuple[Path, ExitStack], how: str) -> None:
    etcd, job = one_etcd(place)
    first, second = loses_coordinator_and_etcd(etcd, job)
    if how != "killed":
        time.sleep(5.0)
    etcd.start(empty=how == "empty")
    second.until("coordinates the job now")
    job.advance()
    wait_for(lambda: job.kinds()[:2] == ["death", "join"], *job.hosts)
    job.ends()
    assert "a new agent of this host takes part" in first.said


@pytest.mark.long
def test_the_coordinator_is_lost_and_etcd_comes_back_with_older_data(place: tuple[Path, ExitStack]) -> None:
    etcd, job = one_etcd(place)
    first, second = job.founded()
    etcd.keep()
    job.kill_worker(second)
    wait_for(lambda: job.kinds()[:2] == ["death", "join"], *job.hosts)
    job.advance(5)
    etcd.kill()
    job.kill_agent(first)
    second.until("the search for the agent that coordinates the job waits for it")
    etcd.start_from_kept()
    second.until("coordinates the job now")
    job.advance()
    wait_for(lambda: job.kinds()[:4] == ["death", "join", "death", "join"], *job.hosts)
    job.ends()
    epochs = [each["epoch"] for each in second.incidents]
    assert epochs == sorted({*epochs}), "no epoch is used again"


@pytest.mark.long
def test_of_two_followers_one_goes_on_with_a_job_that_etcd_has_forgotten(place: tuple[Path, ExitStack]) -> None:
    etcd, job = one_etcd(place)
    first = job.host(hosts_min=3)
    first.until("waiting for 2 more hosts")
    others = [job.host(), job.host()]
    job.advance(5)
    etcd.kill()
    job.kill_agent(first)
    for host in others:
        host.until("the search for the agent that coordinates the job waits for it")
    etcd.start(empty=True)
    wait_for(lambda: job.kinds()[:2] == ["death", "join"], *job.hosts)
    job.ends()
    assert sum(host.said.count("coordinates the job now") for host in others) == 1


@pytest.mark.long
def test_a_coordinator_that_all_took_for_lost_and_nobody_succeeded_waits_for_what_they_have(place: tuple[Path, ExitStack]) -> None:
    """They have closed their connections, and live: etcd stands still too, so nobody else is elected."""
    etcd, job = one_etcd(place)
    first, *others = [*job.founded(), job.host()]
    wait_for(lambda: len(job.members(first)) == 3, *job.hosts)
    job.advance(5)
    etcd.signal(signal.SIGSTOP)
    agent = json.loads((first.directory / "members.json").read_text())["agent"]
    os.kill(agent, signal.SIGSTOP)
    for host in others:
        host.until("it has been silent for 2 s")
    os.kill(agent, signal.SIGCONT)
    wait_for(lambda: first.said.count("its connection ended") >= 2, *job.hosts)
    etcd.signal(signal.SIGCONT)
    wait_for(lambda: job.kinds()[:3] == ["join", "death", "join"], *job.hosts)
    job.ends()


@pytest.mark.long
def test_a_coordinator_that_stands_still_while_etcd_loses_its_data_is_awaited(place: tuple[Path, ExitStack]) -> None:
    etcd, job = one_etcd(place)
    first, second = job.founded()
    etcd.kill()
    agent = json.loads((first.directory / "members.json").read_text())["agent"]
    os.kill(agent, signal.SIGSTOP)
    second.until("it has been silent for 2 s")
    etcd.start(empty=True)
    second.until("may train without this one: they are awaited")
    step = job.step
    os.kill(agent, signal.SIGCONT)
    wait_for(lambda: job.kinds()[:2] == ["death", "join"], *job.hosts)
    assert job.step >= step
    job.ends()
    assert "a new agent of this host takes part" in first.said


@pytest.mark.long
def test_a_host_whose_coordinator_and_etcd_do_not_come_back_says_what_to_do(place: tuple[Path, ExitStack]) -> None:
    etcd, job = one_etcd(place)
    first, second = job.founded()
    etcd.kill()
    agent = json.loads((first.directory / "members.json").read_text())["agent"]
    os.kill(agent, signal.SIGSTOP)
    second.until("it has been silent for 2 s")
    etcd.start(empty=True)
    second.until("may train without this one: they are awaited")
    assert second.process.wait(120) == 75, second.said  # the exit code that asks a scheduler to start it again
    assert "etcd has lost the data of this job, and with it the record of its members" in second.said
    assert "cannot be reached for 60 s, and may have gone on without this host" in second.said
    os.kill(agent, signal.SIGKILL)


@pytest.mark.long
def test_a_host_that_comes_while_the_job_is_taken_over_can_take_it_over_itself(place: tuple[Path, ExitStack]) -> None:
    """The takeover waits for the third host, whose agent stands still, until its lease is over: it was renewed a second longer than that of
    the first host's agent. Meanwhile the first host has a new agent."""
    folder, stack = place
    folder.mkdir()
    etcd = stack.enter_context(etcd_cluster(folder / "etcd"))
    job = Job(stack.enter_context(cluster(folder, etcd.addresses)), {"copies": 3})
    first = job.host(hosts_min=3)
    first.until("waiting for 2 more hosts")
    second, third = job.host(), job.host()
    job.advance(5)
    job.kill_agent(first)
    time.sleep(1.0)
    os.kill(json.loads((third.directory / "members.json").read_text())["agent"], signal.SIGSTOP)
    second.until("coordinates the job now")
    job.hosts.remove(third)
    wait_for(lambda: len(job.members(first)) == len(job.members(second)) == 2, *job.hosts)
    job.advance(5)
    job.kill_agent(second)
    job.advance(5)
    assert "coordinates the job now" in first.said
    wait_for(lambda: all(len(job.members(host)) == 2 for host in job.hosts), *job.hosts)
    job.ends()


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_any_sequence_of_troubles_and_losses(place: tuple[Path, ExitStack], seed: int) -> None:
    """Each trouble lasts some seconds, in which a worker or an agent may be killed; when it is over, all hosts have members again."""
    folder, stack = place
    folder.mkdir()
    etcd = stack.enter_context(etcd_cluster(folder / "etcd"))
    late = stack.enter_context(proxy(etcd.ports[0]))
    job, random = Job(stack.enter_context(cluster(folder, f"127.0.0.1:{late.port}"))), Random(seed)
    hosts = job.founded()
    kinds = {**TROUBLES, "down": troubles.down, "late": lambda _: troubles.slow(late)}
    for _ in range(4):
        kind, loss = random.choice(sorted(kinds)), random.choice(["worker", "agent", "nobody"])
        trouble, before, after = kinds[kind](etcd), random.uniform(0.0, 8.0), random.uniform(0.0, 8.0)
        host = random.choice(hosts)
        print(f"{kind} for {before:.1f} s, a loss ({loss}) of host {hosts.index(host)}, and {after:.1f} s more, at step {job.step}")
        trouble.begin()
        time.sleep(before)
        job.advance(2)
        if loss != "nobody":
            job.kill_worker(host) if loss == "worker" else job.kill_agent(host)
        time.sleep(after)
        trouble.end()
        job.advance(5)
        wait_for(lambda: all(len(job.members(each)) == 2 for each in hosts), *hosts)
        job.advance(5)
    job.ends()


@pytest.mark.long
def test_an_agent_that_waits_for_etcd_can_be_asked_to_end(place: tuple[Path, ExitStack]) -> None:
    etcd, job = one_etcd(place)
    etcd.kill()
    host = job.host()
    host.until(PART)
    host.process.send_signal(signal.SIGTERM)
    assert host.process.wait(20) == 128 + signal.SIGTERM, host.said
