"""Tests that a new coordinator adopts no proposal of the last one, and that each precondition of a commit is necessary for that."""

from __future__ import annotations

import dataclasses

import pytest

from elastic.errors import Conflict
from elastic.membership.attempts import Attempts
from elastic.membership.claim import Claim
from elastic.membership.election import Election
from elastic.membership.views import ViewStore, number
from tests.etcd_access import EtcdClient
from tests.recovery.recovering import view_of


class Coordinators:
    """Agent `here` has opened attempt (2, 1), everybody has voted for its proposal, and then `there` was elected."""

    def __init__(self, client: EtcdClient) -> None:
        self.etcd = client
        self.claim = Claim(client, "job", "first")
        self.claim.take(client.grant(30))
        self.views = ViewStore(client, self.claim.prefix)
        self.here, self.there = self._agent("here"), self._agent("there")
        self.first = dataclasses.replace(view_of([0, 1, 2]), epoch=1, attempt=0)
        self.proposed = {attempt: dataclasses.replace(self.first, epoch=2, attempt=attempt) for attempt in (1, 2)}
        self.views.publish(self.first)
        self.here.begin((2, 1))
        self.here.publish((2, 1), {"resume": 7})
        self.here.vote((2, 1), dict.fromkeys((0, 1, 2)))
        client.delete(f"{self.claim.prefix}coordinator")  # its lease has expired
        self.there.begin((2, 2))

    def _agent(self, name: str) -> Attempts:
        election = Election(self.etcd, f"{self.claim.prefix}coordinator", name, lambda: self.etcd.grant(30))
        return Attempts(self.etcd, self.claim, name, election, self.views)

    @property
    def committed(self) -> tuple[int, int] | None:
        found = self.etcd.get(self.views.key)
        assert found is not None
        return number(found.value)


def test_a_successor_commits_its_own_attempt_only(client: EtcdClient) -> None:
    job = Coordinators(client)
    with pytest.raises(Conflict, match=r"attempt 2\.1 is not the one that this agent has started"):
        job.there.commit((2, 1), job.proposed[1], job.first)
    with pytest.raises(Conflict, match=r"\[0, 1, 2\] have not voted for attempt 2\.2"):
        job.there.commit((2, 2), job.proposed[1], job.first)
    with pytest.raises(Conflict, match="agent there coordinates the job"):
        job.here.commit((2, 1), job.proposed[1], job.first)
    assert job.committed == (1, 0)
    job.there.vote((2, 2), dict.fromkeys((0, 1, 2)))
    job.there.commit((2, 2), job.proposed[2], job.first)
    assert job.committed == (2, 2)


def test_without_comparing_the_attempt_a_proposal_is_adopted(client: EtcdClient) -> None:
    job = Coordinators(client)
    job.there._started = (2, 1)
    job.there.commit((2, 1), job.proposed[1], job.first)
    assert job.committed == (2, 1)


def test_without_comparing_the_coordinator_one_that_was_replaced_commits(client: EtcdClient) -> None:
    job = Coordinators(client)
    claim, held, attempt = job.here._demands
    job.here._demands = (claim, attempt)
    with pytest.raises(Conflict, match="agent there coordinates the job"):
        job.here.commit((2, 1), job.proposed[1], job.first)
    job.here._demands = ()
    job.here.commit((2, 1), job.proposed[1], job.first)
    assert job.committed == (2, 1)
    assert held.key == "/elastic/job/first/coordinator"
