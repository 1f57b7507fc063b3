"""Tests replies of etcd that are lost together with its data, on a real etcd with each interleaving forced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from elastic.errors import Conflict, EtcdUnavailable
from elastic.membership.views import mark
from elastic.view import View
from tests.etcd_access import Compare, EtcdClient
from tests.membership.test_attempts import PREFIX, Agent, agent, committed, first, following

__all__ = ["first"]  # the fixture

LIMIT_S = 60.0  # seconds, for something that takes milliseconds


class Interrupted:
    """The client of an agent. When it writes `key`, once, `meanwhile` is called: `when` the write is "done" and its answer is lost,
    "before" it, or when it was "refused".
    """

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        self.key = ""
        self.when = "done"
        self.meanwhile: Callable[[], Any] = lambda: None
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def transaction(self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, **rest: Any) -> int:
        if not self.key or not any(key.endswith(self.key) for key in puts):
            return self._client.transaction(demands, puts, lease=lease, **rest)
        self.key = ""
        self.lost += 1
        if self.when == "before":
            self.meanwhile()
            return self._client.transaction(demands, puts, lease=lease, **rest)
        try:
            self._client.transaction(demands, puts, lease=lease, **rest)
        except Conflict:
            assert self.when == "refused"
            self.meanwhile()
            raise
        assert self.when == "done"
        self.meanwhile()
        raise EtcdUnavailable("socket closed")

    def compare_and_put(self, key: str, value: str, expected_mod_revision: int, *, lease: int | None = None) -> int:
        return self.transaction([Compare(key=key, mod_revision=expected_mod_revision)], {key: value}, lease=lease)


@pytest.fixture
def interrupted(client: EtcdClient) -> Interrupted:
    return Interrupted(client)


def emptied(client: EtcdClient) -> None:
    """It is started again without its data."""
    client.delete_prefix("/")


def votes(here: Agent, attempt_id: tuple[int, int]) -> None:
    here.attempts.begin(attempt_id)
    here.attempts.publish(attempt_id, {"resume": 7})
    here.attempts.vote(attempt_id, {0: None, 1: None})


def commit(here: Agent, after: View, before: View) -> None:
    """As the agent's task does it: repeated while etcd is away."""
    for _ in range(2):
        try:
            here.attempts.vote((after.epoch, after.attempt), {0: None, 1: None})
            here.attempts.commit((after.epoch, after.attempt), after, before)
            return
        except EtcdUnavailable:
            pass
    raise AssertionError("etcd was away twice")


@pytest.mark.parametrize("seen", [True, False])
def test_a_commit_whose_answer_and_data_are_lost_costs_no_later_attempt(
    client: EtcdClient, interrupted: Interrupted, first: View, seen: bool
) -> None:
    """The watch may have seen the view: then workers train in it already."""
    here, second = agent(interrupted), following(first)
    third = following(second)
    watched = threading.Event()
    if seen:
        here.views.watch(lambda view: watched.set() if view is second else None)
    here.views.publish(first)
    votes(here, (2, 1))
    interrupted.key, interrupted.meanwhile = "view", lambda: (not seen or watched.wait(LIMIT_S), emptied(client))
    commit(here, second, first)
    assert interrupted.lost == 1
    assert watched.is_set() == seen
    votes(here, (3, 1))
    commit(here, third, second)
    assert committed(client) == mark(third)


@pytest.mark.parametrize("when", ["begun", "voted", "committing"])
def test_an_etcd_that_comes_back_empty_in_an_attempt_costs_no_attempt(
    client: EtcdClient, interrupted: Interrupted, first: View, when: str
) -> None:
    here = agent(interrupted)
    here.views.publish(first)
    here.attempts.begin((2, 1))
    if when == "begun":
        emptied(client)
    here.attempts.publish((2, 1), {"resume": 7})
    here.attempts.vote((2, 1), {0: None, 1: None})
    if when == "voted":
        emptied(client)
    elif when == "committing":
        interrupted.key, interrupted.when, interrupted.meanwhile = "view", "before", lambda: emptied(client)
    here.attempts.commit((2, 1), following(first), first)
    assert committed(client) == mark(following(first))


def test_what_is_restored_does_not_replace_a_view_that_is_committed_meanwhile(
    client: EtcdClient, interrupted: Interrupted, first: View
) -> None:
    """Two threads restore: the one of the lease, and the one with the attempt, which goes on and commits."""
    here, second = agent(interrupted), following(first)
    here.views.publish(first)

    def others() -> None:
        votes(here, (2, 1))
        here.attempts.commit((2, 1), second, first)

    emptied(client)
    here.claim.retake(client.grant(30))
    interrupted.key, interrupted.when, interrupted.meanwhile = "view", "before", others
    assert here.attempts.restore()
    assert committed(client) == mark(second)
    assert not here.attempts.restore()


def test_a_thread_that_restores_first_costs_no_attempt(client: EtcdClient, interrupted: Interrupted, first: View) -> None:
    here = agent(interrupted)
    here.views.publish(first)
    emptied(client)
    interrupted.key, interrupted.when, interrupted.meanwhile = "attempt", "refused", here.attempts.restore
    here.attempts.begin((2, 1))
    assert interrupted.lost == 1
    assert committed(client) == mark(first)


@pytest.mark.parametrize("kept", [True, False])
def test_a_first_view_whose_answer_is_lost_is_published(client: EtcdClient, interrupted: Interrupted, first: View, kept: bool) -> None:
    """Also if etcd is away still when it is asked for it."""
    here = agent(interrupted)

    class Away:
        left = 1

        def get(self, key: str) -> Any:
            if key == here.views.key and self.left:
                self.left -= 1
                raise EtcdUnavailable("away")
            return client.get(key)

        def __getattr__(self, name: str) -> Any:
            return getattr(interrupted, name)

    here.views._store = Away()
    here.attempts.begin((1, 0))
    interrupted.key, interrupted.meanwhile = "view", lambda: None if kept else emptied(client)
    with pytest.raises(EtcdUnavailable):
        here.views.publish(first)
    here.attempts.begin((1, 0))
    here.views.publish(first)
    assert committed(client) == mark(first)
    votes(here, (2, 1))
    here.attempts.commit((2, 1), following(first), first)


def test_a_view_that_another_has_published_is_a_conflict(client: EtcdClient, first: View) -> None:
    here = agent(client)
    client.put(f"{PREFIX}view", mark(following(first)))
    with pytest.raises(Conflict):
        here.views.publish(first)
