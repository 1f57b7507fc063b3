"""Tests attempts at the next view on a real etcd: each precondition of a commit is violated once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from elastic.errors import Conflict, EtcdUnavailable, NameLost
from elastic.membership.attempts import Attempts
from elastic.membership.claim import Claim
from elastic.membership.election import Election
from elastic.membership.founding import found
from elastic.membership.views import ViewStore, mark
from elastic.view import View
from tests.etcd_access import Compare, EtcdClient, KeyValue
from tests.membership.test_founding import ready


@pytest.fixture(scope="module")
def first() -> View:
    return found({0: ready(profile=True), 1: ready()}, None)


@dataclass
class Agent:
    attempts: Attempts
    views: ViewStore
    claim: Claim


PREFIX = "/elastic/job/first/"


def agent(client: Any, name: str = "here", incarnation: str = "first") -> Agent:
    claim = Claim(client, "job", incarnation)
    claim.retake(client.grant(30))
    views = ViewStore(client, claim.prefix)
    lease = client.grant(30)
    election = Election(client, f"{claim.prefix}coordinator", name, lambda: lease)
    return Agent(Attempts(client, claim, name, election, views, reclaim=lambda: claim.retake(client.grant(30))), views, claim)


def committed(client: Any) -> str | None:
    entry = client.get(f"{PREFIX}view")
    return None if entry is None else entry.value


def following(view: View, attempt: int = 1) -> View:
    return dataclasses.replace(view, epoch=view.epoch + 1, attempt=attempt)


def test_an_attempt_that_all_voted_for_is_committed(client: EtcdClient, first: View) -> None:
    here = agent(client)
    here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.publish((2, 1), {"resume": 7})
    here.attempts.vote((2, 1), {0: None, 1: None})
    for _ in range(2):  # repeating it changes nothing
        here.attempts.commit((2, 1), following(first), first)
        assert committed(client) == mark(following(first))
    here.attempts.sweep()
    keys = ["first/attempt", "first/coordinator", "first/view", "incarnation"]
    assert sorted(entry.key for entry in client.get_prefix("/elastic/job/")) == [f"/elastic/job/{key}" for key in keys]


def test_everything_may_be_repeated(client: EtcdClient, first: View) -> None:
    here = agent(client)
    here.views.publish(first)
    for _ in range(2):
        here.attempts.begin((2, 1))
        here.attempts.publish((2, 1), {"resume": 7})
        here.attempts.vote((2, 1), {0: None, 1: None})
    here.attempts.commit((2, 1), following(first), first)


@pytest.mark.parametrize("votes", [{}, {0: None}, {0: None, 1: "digest of layer 2 differs"}])
def test_without_every_vote_nothing_is_committed(client: EtcdClient, first: View, votes: dict[int, str | None]) -> None:
    here = agent(client)
    here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.vote((2, 1), votes)
    with pytest.raises(Conflict, match=r"have not voted for attempt 2\.1"):
        here.attempts.commit((2, 1), following(first), first)
    assert committed(client) == mark(first)


@pytest.mark.parametrize("broken", ["first/view", "first/attempt", "first/coordinator", "first/votes/2.1/here", "incarnation"])
def test_whatever_changed_since_it_was_read_stops_the_commit(client: EtcdClient, first: View, broken: str) -> None:
    key = f"/elastic/job/{broken}"

    class Interfering:
        """Somebody writes the key at the last moment."""

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def transaction(self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, **rest: Any) -> int:
            if any(text.endswith("view") for text in puts) and client.get(f"{PREFIX}view") is not None:
                client.put(key, "{}")
            return client.transaction(demands, puts, lease=lease)

    here = agent(Interfering())
    here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.vote((2, 1), {0: None, 1: None})
    with pytest.raises(Conflict, match="another client wrote"):
        here.attempts.commit((2, 1), following(first), first)
    assert committed(client) == ("{}" if broken == "first/view" else mark(first))


def test_an_attempt_that_is_not_begun_cannot_be_committed(client: EtcdClient, first: View) -> None:
    here = agent(client)
    here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.begin((2, 2))
    here.attempts.vote((2, 1), {0: None, 1: None})
    with pytest.raises(Conflict, match=r"2\.1 is not the one"):
        here.attempts.commit((2, 1), following(first), first)


def test_numbers_are_burned_for_all(client: EtcdClient) -> None:
    here = agent(client)
    here.attempts.begin((2, 3))
    with pytest.raises(Conflict, match=r"attempt 2\.3 has started, after 2\.2"):
        here.attempts.begin((2, 2))


def test_only_the_coordinator_begins(client: EtcdClient) -> None:
    here, there = agent(client), agent(client, "there")
    here.attempts.begin((2, 1))
    with pytest.raises(Conflict, match="agent here coordinates the job"):
        there.attempts.begin((2, 2))
    client.delete(f"{PREFIX}coordinator")
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

        def transaction(self, demands: Sequence[Compare], puts: Mapping[str, str], *, lease: int | None = None, **rest: Any) -> int:
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

    store = LosingAnswers()
    here = insist(lambda: agent(store))
    here.views.publish(first)
    for attempt in (1, 2, 3):
        insist(lambda attempt=attempt: here.attempts.begin((2, attempt)))
    here.attempts.vote((2, 3), {0: None, 1: None})
    insist(lambda: here.attempts.commit((2, 3), following(first, 3), first))
    assert committed(client) == mark(following(first, 3))
    assert store.lost > 6


def test_a_transaction_writes_all_or_nothing(client: EtcdClient) -> None:
    revision = client.transaction([Compare(key="/a", mod_revision=0)], {"/a": "1", "/b": "2"})
    assert client.get("/b") == KeyValue(key="/b", value="2", mod_revision=revision)
    for demand in (Compare(key="/a", value="2"), Compare(key="/a", mod_revision=0), Compare(key="/a", mod_revision=revision, value="2")):
        with pytest.raises(Conflict, match="/a"):
            client.transaction([demand], {"/b": "3", "/c": "4"})
    client.transaction([Compare(key="/a", mod_revision=revision, value="1"), Compare(key="/c", mod_revision=0)], {"/b": "3"})
    assert client.get("/c") is None


LARGE = 2_000_000  # more than etcd's limit of 1.5 MiB


def test_a_large_proposal_and_large_refusals_leave_small_values_in_etcd(client: EtcdClient, first: View) -> None:
    here = agent(client)
    here.views.publish(first)
    here.attempts.begin((2, 1))
    proposal = {"transfers": "x" * LARGE}
    here.attempts.publish((2, 1), proposal)
    here.attempts.publish((2, 1), proposal)
    with pytest.raises(Conflict):
        here.attempts.publish((2, 1), {"transfers": "x" * (LARGE - 1) + "y"})
    here.attempts.vote((2, 1), dict.fromkeys(range(100), "x" * LARGE))
    here.attempts.vote((2, 1), {0: None, 1: None})
    large = dataclasses.replace(following(first), members=tuple(dataclasses.replace(m, address="x" * LARGE) for m in first.members))
    here.attempts.commit((2, 1), large, first)
    assert committed(client) == mark(large)
    assert max(len(entry.value or "") for entry in client.get_prefix("/elastic/job/")) < 300


LOST = ["incarnation", "first/view", "first/attempt", "first/coordinator", "first/votes/2.1/here", "first/proposals/2.1"]


@pytest.mark.parametrize("what", ["gone", "garbage", "older"])
@pytest.mark.parametrize("keys", [[key] for key in LOST] + [LOST])
def test_what_etcd_has_lost_or_somebody_overwrote_is_written_again(client: EtcdClient, first: View, keys: list[str], what: str) -> None:
    here = agent(client)
    here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.publish((2, 1), {"resume": 7})
    here.attempts.vote((2, 1), {0: None, 1: None})
    older = {"first/view": mark(dataclasses.replace(first, epoch=0)), "first/attempt": "1.9"}
    for key in keys:
        if what == "gone":
            client.delete(f"/elastic/job/{key}")
        else:
            client.put(f"/elastic/job/{key}", older.get(key, "[]") if what == "older" else "\x00garbage")
    here.attempts.commit((2, 1), following(first), first)
    assert committed(client) == mark(following(first))
    here.attempts.begin((3, 1))
    here.attempts.publish((3, 1), {"resume": 8})
    here.attempts.vote((3, 1), {0: None, 1: None})
    here.attempts.commit((3, 1), following(following(first)), following(first))
    assert committed(client) == mark(following(following(first)))
    assert client.get("/elastic/job/incarnation") == dataclasses.replace(
        client.get("/elastic/job/incarnation"),
        value=here.claim.held.value,  # pyright: ignore[reportArgumentType]
    )


def test_an_agent_whose_name_another_incarnation_has_writes_nothing_more(client: EtcdClient, first: View) -> None:
    here = agent(client)
    here.views.publish(first)
    here.attempts.begin((2, 1))
    here.attempts.vote((2, 1), {0: None, 1: None})
    client.delete(here.claim.key)  # its lease has expired
    there = agent(client, "there", "second")
    before = client.get_prefix("/elastic/job/")
    with pytest.raises(NameLost, match=r"another job has taken its name 'job' since"):
        here.attempts.commit((2, 1), following(first), first)
    with pytest.raises(NameLost, match=r"another job has taken its name 'job' since \(on host .* incarnation second\)"):
        here.attempts.begin((2, 2))
    here.claim.give_up()
    assert client.get_prefix("/elastic/job/") == before, "nothing of either is changed"
    there.views.publish(first)
    there.attempts.begin((2, 1))
