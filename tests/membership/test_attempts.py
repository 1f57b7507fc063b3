"""Attempts at the next view: against a real etcd, what a commit demands, each demand broken once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from elastic.errors import Conflict, EtcdUnavailable
from elastic.membership.attempts import Attempts
from elastic.membership.election import Election
from elastic.membership.founding import found
from elastic.membership.views import ViewStore
from elastic.view import View
from tests.etcd_access import Compare, Entry, EtcdClient
from tests.membership.test_founding import ready


@pytest.fixture(scope="module")
def first() -> View:
    return found({0: ready(profile=True), 1: ready()}, None)


@dataclass
class Agent:
    attempts: Attempts
    views: ViewStore


def agent(client: Any, name: str = "here") -> Agent:
    views = ViewStore(client, "job")
    return Agent(Attempts(client, "job", name, Election(client, "/elastic/job/coordinator", name, lambda: client.grant(30)), views), views)


def following(view: View, attempt: int = 1) -> View:
    return dataclasses.replace(view, epoch=view.epoch + 1, attempt=attempt)


def test_an_attempt_that_all_voted_for_is_committed(client: EtcdClient, first: View) -> None:
    here = agent(client)
    revision = here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.publish((2, 1), {"resume": 7})
    here.attempts.vote((2, 1), {0: None, 1: None})
    committed = here.attempts.commit((2, 1), following(first), revision)
    assert here.views.read() == (following(first), committed)
    assert here.attempts.commit((2, 1), following(first), revision) == committed, "to repeat it changes nothing"
    here.attempts.sweep()
    assert sorted(entry.key for entry in client.get_prefix("/elastic/job/")) == [
        "/elastic/job/attempt",
        "/elastic/job/coordinator",
        "/elastic/job/view",
    ]


def test_everything_may_be_repeated(client: EtcdClient, first: View) -> None:
    here = agent(client)
    revision = here.views.publish(first)
    for _ in range(2):
        here.attempts.begin((2, 1))
        here.attempts.publish((2, 1), {"resume": 7})
        here.attempts.vote((2, 1), {0: None, 1: None})
    here.attempts.commit((2, 1), following(first), revision)


@pytest.mark.parametrize("votes", [{}, {0: None}, {0: None, 1: "digest of layer 2 differs"}])
def test_without_every_vote_nothing_is_committed(client: EtcdClient, first: View, votes: dict[int, str | None]) -> None:
    here = agent(client)
    revision = here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.vote((2, 1), votes)
    with pytest.raises(Conflict, match=r"have not voted for attempt 2\.1"):
        here.attempts.commit((2, 1), following(first), revision)
    assert here.views.read() == (first, revision)


@pytest.mark.parametrize("broken", ["view", "attempt", "coordinator", "votes/2.1/here"])
def test_whatever_changed_since_it_was_read_stops_the_commit(client: EtcdClient, first: View, broken: str) -> None:
    key = f"/elastic/job/{broken}"

    class Interfering:
        """Somebody writes the key at the last moment."""

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def transaction(self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None) -> int:
            if any(text.endswith("view") for text in puts):
                client.put(key, "{}")
            return client.transaction(demands, puts, lease=lease)

    here = agent(Interfering())
    revision = here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.vote((2, 1), {0: None, 1: None})
    with pytest.raises(Conflict, match="somebody else wrote"):
        here.attempts.commit((2, 1), following(first), revision)
    entry = client.get(here.views.key)
    assert entry is not None
    assert (entry.mod_revision == revision) == (broken != "view")


def test_an_attempt_that_is_not_begun_cannot_be_committed(client: EtcdClient, first: View) -> None:
    here = agent(client)
    revision = here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.begin((2, 2))
    here.attempts.vote((2, 1), {0: None, 1: None})
    with pytest.raises(Conflict, match=r"2\.1 is not the one"):
        here.attempts.commit((2, 1), following(first), revision)


def test_numbers_are_burned_for_all(client: EtcdClient) -> None:
    here = agent(client)
    here.attempts.begin((2, 3))
    with pytest.raises(Conflict, match=r"attempt 2\.3 has begun, after 2\.2"):
        here.attempts.begin((2, 2))


def test_only_the_coordinator_begins(client: EtcdClient) -> None:
    here, there = agent(client), agent(client, "there")
    here.attempts.begin((2, 1))
    with pytest.raises(Conflict, match="agent here coordinates the job"):
        there.attempts.begin((2, 2))
    client.delete_prefix("/elastic/job/coordinator")
    there.attempts.begin((2, 2))
    with pytest.raises(Conflict, match="agent there"):
        here.attempts.begin((2, 3))


def test_a_proposal_is_not_replaced(client: EtcdClient) -> None:
    here = agent(client)
    here.attempts.publish((2, 1), {"resume": 7})
    with pytest.raises(Conflict):
        here.attempts.publish((2, 1), {"resume": 8})


def test_an_answer_that_was_lost_is_found_by_trying_again(client: EtcdClient, first: View) -> None:
    class LosingAnswers:
        lost = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def transaction(self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None) -> int:
            revision = client.transaction(demands, puts, lease=lease)
            self.lost += 1
            if self.lost % 2:
                raise EtcdUnavailable("broke off")
            return revision

    def insist(call: Any) -> Any:
        try:
            return call()
        except EtcdUnavailable:
            return call()

    here = agent(LosingAnswers())
    revision = here.views.publish(first)
    insist(lambda: here.attempts.begin((2, 1)))
    here.attempts.begin((2, 2))
    here.attempts.vote((2, 2), {0: None, 1: None})
    committed = insist(lambda: here.attempts.commit((2, 2), following(first, 2), revision))
    assert here.views.read() == (following(first, 2), committed)


def test_a_transaction_writes_all_or_nothing(client: EtcdClient) -> None:
    revision = client.transaction([Compare(key="/a", mod_revision=0)], {"/a": "1", "/b": "2"})
    assert client.get("/b") == Entry(key="/b", value="2", mod_revision=revision)
    for demand in (Compare(key="/a", value="2"), Compare(key="/a", mod_revision=0), Compare(key="/a", mod_revision=revision, value="2")):
        with pytest.raises(Conflict, match="/a"):
            client.transaction([demand], {"/b": "3", "/c": "4"})
    client.transaction([Compare(key="/a", mod_revision=revision, value="1"), Compare(key="/c", mod_revision=0)], {"/b": "3"})
    assert client.get("/c") is None
