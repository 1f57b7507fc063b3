"""Tests sessions on a real etcd: names, expired leases, an etcd that returns empty, and every way to end a private etcd."""

from __future__ import annotations

import dataclasses
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.agent.loop import Loop
from elastic.errors import ElasticError, EtcdFull, EtcdUnavailable, NameLost, SettingsError
from elastic.membership import keeper, session
from elastic.membership.founding import found
from elastic.membership.keeper import NextStart, next_start
from elastic.membership.server import PrivateEtcd
from elastic.membership.views import mark
from elastic.settings import JobSettings
from elastic.view import View
from tests.etcd_access import EtcdClient, EtcdEndpoint, Notices, Session, etcd_with
from tests.membership.test_founding import ready

LIMIT_S = 20.0  # seconds, for something that takes one second


@pytest.fixture(scope="module")
def view() -> View:
    return found({0: ready(profile=True), 1: ready()}, None)


class Agent:
    """A session with a loop that the test runs; records the messages."""

    def __init__(self, directory: Path, endpoint: EtcdEndpoint | None = None) -> None:
        self.lost: queue.SimpleQueue[ElasticError] = queue.SimpleQueue()
        self.said: list[str] = []
        settings = JobSettings(
            name="job", workers=2, train_fn="m:f", isa="avx2", etcd=None if endpoint is None else str(endpoint), args=("x" * 2_000_000,)
        )
        self.session = Session(settings, directory, Notices(view=lambda _: None, lost=self.lost.put, say=self.said.append))
        self.loop = Loop()
        self.session.tend(self.loop)

    @property
    def pid(self) -> int:
        assert self.session._server is not None
        return self.session._server.pid

    @property
    def keys(self) -> dict[str, str | None]:
        """All that etcd has of the job, by what follows its prefix."""
        client = self.session._client
        assert client is not None
        found = client.get_prefix("/elastic/job/")
        return {entry.key.removeprefix(self.session._claim.prefix): entry.value for entry in found}

    def until(self, met: Callable[[], Any]) -> None:
        """Turns the loop until this is so; an etcd that is away is not."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                if met():
                    return
            except EtcdUnavailable:
                pass
            assert time.monotonic() < deadline, self.said
            self.loop.set_timer(0.02, lambda: None, "test")
            self.loop.turn()

    def founds(self, view: View) -> None:
        self.session.admit({worker: ready() for worker in view.workers})
        self.until(lambda: (self.session.publish(view), True))

    def goes_on(self, view: View) -> bool:
        """Commits another view, as a recovery does."""
        attempts, after = self.session.attempts, dataclasses.replace(view, epoch=view.epoch + 1, attempt=1)
        attempts.begin((after.epoch, 1))
        attempts.publish((after.epoch, 1), {"transfers": "x" * 2_000_000})
        attempts.vote((after.epoch, 1), dict.fromkeys(after.workers))
        attempts.commit((after.epoch, 1), after, view)
        return True


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Any]:
    with etcd_with(tmp_path / "external") as running:
        yield running


@pytest.mark.slow
def test_of_two_jobs_of_one_name_the_later_goes_on_and_the_earlier_ends(etcd: Any, tmp_path: Path, view: View) -> None:
    endpoint = etcd.endpoint()
    first = Agent(tmp_path, endpoint)
    first.founds(view)
    with pytest.raises(SettingsError, match="a job of this name runs"):
        Agent(tmp_path, endpoint)
    client = EtcdClient(endpoint)
    with first.session._lease._lock:  # it is stopped, and its lease expires
        client.revoke(first.session._lease.id)
        second = Agent(tmp_path, endpoint)
        second.founds(view)
    lost = first.lost.get(timeout=LIMIT_S)
    assert isinstance(lost, NameLost)
    assert f"incarnation {second.session._claim.incarnation}" in str(lost)
    with pytest.raises(NameLost):
        first.goes_on(view)
    before = {entry.key: entry for entry in client.get_prefix(second.session._claim.prefix)}
    first.session.close()
    second.goes_on(view)
    assert {entry.key for entry in client.get_prefix(second.session._claim.prefix)} >= before.keys()
    second.session.close()
    assert client.get_prefix("/elastic/") == []
    client.close()


@pytest.mark.slow
def test_a_job_whose_lease_ran_out_takes_its_name_again_where_nobody_has_it(etcd: Any, tmp_path: Path, view: View) -> None:
    agent = Agent(tmp_path, etcd.endpoint())
    agent.founds(view)
    before = agent.keys
    client = EtcdClient(etcd.endpoint())
    for lease in (agent.session._lease, agent.session._job_lease):
        client.revoke(lease.id)
    agent.until(lambda: agent.keys.keys() >= before.keys() - {"coordinator", "attempt"})
    agent.until(lambda: agent.goes_on(view))
    assert agent.keys.keys() >= before.keys()
    agent.session.close()
    client.close()


@pytest.mark.slow
def test_an_external_etcd_that_came_back_empty_gets_what_the_agent_knows(etcd: Any, tmp_path: Path, view: View) -> None:
    agent = Agent(tmp_path, etcd.endpoint())
    agent.founds(view)
    before = agent.keys
    etcd.kill()
    etcd.start(empty=True)
    etcd.endpoint()
    agent.until(lambda: agent.goes_on(view))
    agent.until(lambda: agent.keys.keys() >= before.keys())
    assert agent.lost.empty()
    agent.session.close()


@pytest.mark.slow
@pytest.mark.long
def test_an_etcd_that_answers_nothing_does_not_hold_up_the_end(etcd: Any, tmp_path: Path, view: View) -> None:
    agent = Agent(tmp_path, etcd.endpoint())
    os.kill(etcd.pid, signal.SIGSTOP)
    began = time.monotonic()
    agent.session.close()
    assert time.monotonic() - began < 8.0
    os.kill(etcd.pid, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["kept", "broken", "removed"])
def test_a_private_etcd_that_ends_is_started_again(tmp_path: Path, view: View, data: str) -> None:
    agent = Agent(tmp_path)
    agent.founds(view)
    before, pid = agent.keys, agent.pid
    assert max(len(value or "") for value in before.values()) < 300, "the arguments of the job are not in it"
    if data == "broken":
        shutil.rmtree(tmp_path / "etcd" / "data" / "member")
        (tmp_path / "etcd" / "data" / "member").write_text("")
    elif data == "removed":
        shutil.rmtree(tmp_path / "etcd")
    os.kill(pid, signal.SIGKILL)
    agent.until(lambda: agent.pid != pid and agent.keys.keys() >= before.keys() - {"coordinator", "attempt"})
    agent.until(lambda: agent.goes_on(view))
    assert agent.said[0] == "the private etcd was killed by SIGKILL: it is restarted on its data; training continues"
    assert len(agent.said) == (2 if data == "broken" else 1)
    if data == "broken":
        assert agent.said[1].endswith("it is restarted without its data, which the agent writes again; training continues")
    assert agent.lost.empty()
    agent.session.close()


@pytest.mark.slow
def test_a_private_etcd_that_dies_while_the_job_is_founded(tmp_path: Path, view: View) -> None:
    agent = Agent(tmp_path)
    os.kill(agent.pid, signal.SIGKILL)
    agent.founds(view)
    assert agent.goes_on(view)
    agent.session.close()


@pytest.mark.slow
def test_a_private_etcd_that_stands_still_or_is_full_is_replaced(tmp_path: Path, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "SILENT_S", 1.0)
    agent = Agent(tmp_path)
    agent.founds(view)
    pid = agent.pid
    os.kill(pid, signal.SIGSTOP)
    agent.until(lambda: agent.pid != pid and agent.keys)
    assert agent.said[0] == "the private etcd cannot be reached (no answer in time): it is killed and restarted"
    pid = agent.pid
    agent.session.unanswered(EtcdFull("full"), 0.0)
    agent.until(lambda: agent.pid != pid and "view" in agent.keys)
    assert "restarted without its data, which the agent writes again" in agent.said[-1]
    agent.session.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "signal_"),
    [
        pytest.param("starting", signal.SIGSTOP, marks=pytest.mark.long),
        ("connecting", signal.SIGSTOP),
        ("connecting", signal.SIGKILL),
        ("founding", signal.SIGSTOP),
        pytest.param("begin", signal.SIGSTOP, marks=pytest.mark.long),
        ("commit", signal.SIGKILL),
        *(pytest.param(call, signal.SIGSTOP, marks=pytest.mark.long) for call in ("publish", "vote", "commit")),
        *(pytest.param(call, signal.SIGKILL, marks=pytest.mark.long) for call in ("begin", "publish", "vote")),
    ],
)
def test_a_private_etcd_may_be_stopped_for_ever_or_killed_at_any_moment(
    tmp_path: Path, view: View, monkeypatch: pytest.MonkeyPatch, moment: str, signal_: signal.Signals
) -> None:
    monkeypatch.setattr(keeper, "SILENT_S", 1.0)
    monkeypatch.setattr(session, "_STARTED_S", 2.0)
    hit: list[int] = []

    def strike(etcd: int) -> None:
        if not hit:
            hit.append(etcd)
            os.kill(etcd, signal_)

    endpoint = PrivateEtcd.endpoint

    def connecting(self: PrivateEtcd, timeout_s: float) -> EtcdEndpoint:
        if moment == "starting":  # only stopped: an etcd that ends before it serves is reported at once
            strike(self.pid)
        found = endpoint(self, timeout_s)
        if moment == "connecting":
            strike(self.pid)
        return found

    monkeypatch.setattr(PrivateEtcd, "endpoint", connecting)
    agent = Agent(tmp_path)
    if moment == "founding":
        strike(agent.pid)
    agent.founds(view)
    if moment not in ("starting", "connecting", "founding"):
        act = getattr(agent.session.attempts, moment)
        monkeypatch.setattr(agent.session.attempts, moment, lambda *given: (strike(agent.pid), act(*given)))
    agent.until(lambda: agent.goes_on(view))
    assert agent.lost.empty()
    assert agent.pid != hit[0]
    agent.session.close()


def test_one_that_is_slow_is_not_ended_again_and_again() -> None:
    now, ended = [0.0], []

    class Server:
        pid = os.getpid()
        serving = True

        def kill(self) -> None:
            ended.append(now[0])

        def reap(self) -> int:
            return -signal.SIGKILL

        def start(self, *, empty: bool) -> None:
            pass

    class NoLoop:
        def watch(self, source: Any, act: Any) -> None: ...
        def forget(self, source: Any) -> None: ...
        def post(self, act: Any) -> None: ...
        def set_timer(self, seconds: float, act: Any, name: str = "") -> None: ...
        def clear_timer(self, name: str = "") -> None: ...

    server: Any = Server()
    watching = keeper.Keeper(server, NoLoop(), lambda _: None, lambda: now[0])
    for second in range(400):
        now[0] = float(second)
        for _ in range(2):
            watching.unanswered(EtcdUnavailable("slow"), float(second))
        if ended and ended[-1] == now[0]:
            watching._ended()
    assert ended == [4.0, 12.0, 28.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0]
    watching.close()


def test_starts_that_fail_are_tried_without_the_data_and_then_less_often() -> None:
    assert next_start(0) == NextStart(empty=False, after_s=0.0)
    assert next_start(1) == NextStart(empty=True, after_s=0.0)
    assert [next_start(failures).after_s for failures in range(2, 8)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert all(next_start(failures).empty for failures in range(1, 8))


@pytest.mark.slow
def test_one_that_cannot_be_started_is_told_once_and_tried_again(tmp_path: Path, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent(tmp_path)
    agent.founds(view)
    server, failing = agent.session._server, threading.Event()
    assert server is not None
    start = server.start

    def cannot(*, empty: bool = False) -> None:
        if not failing.is_set():
            raise EtcdUnavailable("the private etcd needs 66 MB of disk")
        start(empty=empty)

    monkeypatch.setattr(server, "start", cannot)
    monkeypatch.setattr(keeper, "next_start", lambda failures: NextStart(empty=True, after_s=0.01))
    os.kill(agent.pid, signal.SIGKILL)
    agent.until(lambda: agent.session._keeper is not None and agent.session._keeper._failures > 5)
    assert len(agent.said) == 2
    assert agent.said[1].startswith("the private etcd needs 66 MB of disk: it is restarted without its data")
    failing.set()
    agent.until(lambda: agent.goes_on(view))
    agent.session.close()


def hosts_of(etcd: Any, tmp_path: Path, *names: str) -> list[Session]:
    """Sessions of agents of one shared job; the first one coordinates it."""
    settings = JobSettings(name="job", workers=2, train_fn="m:f", isa="avx2", etcd=str(etcd.endpoint()), shared=True)
    notices = Notices(view=lambda _: None, lost=lambda _: None, say=lambda _: None)
    found = [Session(settings, tmp_path, notices, agent=name, shared=True) for name in names]
    assert [each.coordinates for each in found] == [True] + [False] * (len(names) - 1)
    assert found[0].campaign(["127.0.0.1", 1])
    return found


@pytest.mark.slow
def test_a_coordinator_that_leaves_a_job_leaves_its_view_to_the_others(etcd: Any, tmp_path: Path, view: View) -> None:
    client = EtcdClient(etcd.endpoint())
    first, second = hosts_of(etcd, tmp_path, "a", "b")
    first.publish(view)
    first.close(goes_on=True)
    assert second.mark() == mark(view)
    assert second.named
    assert second.campaign(["127.0.0.1", 2])
    second.close()
    assert client.get_prefix("/elastic/job/") == []
    client.close()


@pytest.mark.slow
def test_who_no_longer_coordinates_a_job_does_not_end_it(etcd: Any, tmp_path: Path, view: View) -> None:
    first, second = hosts_of(etcd, tmp_path, "a", "b")
    client = EtcdClient(etcd.endpoint())
    first.publish(view)
    client.delete(f"{first._claim.prefix}coordinator")  # its lease ran out
    assert second.campaign(["127.0.0.1", 2])
    first.close()
    assert second.mark() == mark(view)
    assert second.named
    second.close()
    assert client.get_prefix("/elastic/job/") == []
    client.close()


@pytest.mark.slow
def test_a_name_that_has_only_expired_is_taken_again_and_that_of_a_job_that_has_ended_is_not(etcd: Any, tmp_path: Path, view: View) -> None:
    first, second = hosts_of(etcd, tmp_path, "a", "b")
    client = EtcdClient(etcd.endpoint())
    first.publish(view)
    client.delete(second._claim.key)  # all agents stood still
    assert second.named
    first.close()
    assert not second.named
    second.close()
    assert client.get_prefix("/elastic/job/") == []
    client.close()


@pytest.mark.slow
def test_a_new_agent_of_a_host_joins_only_the_job_that_the_one_before_trained_in(etcd: Any, tmp_path: Path, view: View) -> None:
    first, second = hosts_of(etcd, tmp_path, "a", "b")
    settings = JobSettings(name="job", workers=2, train_fn="m:f", isa="avx2", etcd=str(etcd.endpoint()), shared=True)
    notices = Notices(view=lambda _: None, lost=lambda _: None, say=lambda _: None)
    first.publish(view)
    client, known = EtcdClient(etcd.endpoint()), first.incarnation

    def again() -> Session:
        return Session(settings, tmp_path, notices, agent="c", shared=True, incarnation=known)

    client.delete(first._claim.key)  # all agents stood still
    third = again()
    assert not third.coordinates
    assert third.named, "it takes the name again, and the others still have it"
    assert second.named
    for each in (third, second):
        each.close(goes_on=True)
    first.close()
    late = again()
    assert not late.coordinates
    assert not late.named, "the job has ended"
    late.close()
    (other,) = hosts_of(etcd, tmp_path, "d")
    early = again()
    assert not early.named, "the other one has no view yet, and would yield to a job that has one; this one has ended"
    early.close()
    other.publish(view)
    with pytest.raises(
        NameLost, match=f"has ended while this host was cut off from it, and another job has its name .*{other.incarnation}"
    ):
        again()
    other.close()
    assert client.get_prefix("/elastic/job/") == []
    client.close()
