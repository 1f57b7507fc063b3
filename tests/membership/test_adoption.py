"""A successor adopts no proposal of the coordinator before it: the demands of a commit, each removed on purpose, are what forbids it."""

from __future__ import annotations

import dataclasses

import pytest

from elastic.errors import Conflict
from elastic.membership.attempts import Attempts
from elastic.membership.election import Election
from elastic.membership.views import ViewStore
from elastic.view import View
from tests.etcd_access import EtcdClient
from tests.recovery.recovering import view_of


class Coordinators:
    """Agent `here` has opened attempt (2, 1), everybody has voted for its proposal, and then `there` was elected."""

    def __init__(self, client: EtcdClient) -> None:
        self.etcd = client
        self.views = ViewStore(client, "job")
        self.here, self.there = self._agent("here"), self._agent("there")
        first = dataclasses.replace(view_of([0, 1, 2]), epoch=1, attempt=0)
        self.proposed = {attempt: dataclasses.replace(first, epoch=2, attempt=attempt) for attempt in (1, 2)}
        self.revision = self.views.publish(first)
        self.here.begin((2, 1))
        self.here.publish((2, 1), {"resume": 7})
        self.here.vote((2, 1), dict.fromkeys((0, 1, 2)))
        client.delete_prefix("/elastic/job/coordinator")  # its lease has expired
        self.there.begin((2, 2))

    def _agent(self, name: str) -> Attempts:
        election = Election(self.etcd, "/elastic/job/coordinator", name, lambda: self.etcd.grant(30))
        return Attempts(self.etcd, "job", name, election, self.views)

    @property
    def committed(self) -> View:
        found = self.views.read()
        assert found is not None
        return found[0]


def test_a_successor_commits_its_own_attempt_only(client: EtcdClient) -> None:
    job = Coordinators(client)
    with pytest.raises(Conflict, match=r"attempt 2\.1 is not the one that this agent has begun"):
        job.there.commit((2, 1), job.proposed[1], job.revision)
    with pytest.raises(Conflict, match=r"\[0, 1, 2\] have not voted for attempt 2\.2"):
        job.there.commit((2, 2), job.proposed[1], job.revision)
    with pytest.raises(Conflict, match="somebody else wrote"):
        job.here.commit((2, 1), job.proposed[1], job.revision)
    assert job.committed.epoch == 1
    job.there.vote((2, 2), dict.fromkeys((0, 1, 2)))
    job.there.commit((2, 2), job.proposed[2], job.revision)
    assert job.committed == job.proposed[2]


def test_without_comparing_the_attempt_a_proposal_is_adopted(client: EtcdClient) -> None:
    job = Coordinators(client)
    job.there._begun = (2, 1)
    job.there.commit((2, 1), job.proposed[1], job.revision)
    assert job.committed == job.proposed[1]


def test_without_comparing_the_coordinator_one_that_was_replaced_commits(client: EtcdClient) -> None:
    job = Coordinators(client)
    held, attempt = job.here._demands
    job.here._demands = (attempt,)
    with pytest.raises(Conflict, match=r"somebody else wrote"):
        job.here.commit((2, 1), job.proposed[1], job.revision)
    job.here._demands = ()
    job.here.commit((2, 1), job.proposed[1], job.revision)
    assert job.committed == job.proposed[1]
    assert held.key == "/elastic/job/coordinator"
