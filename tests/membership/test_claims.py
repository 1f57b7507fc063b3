"""Tests claims on a job's name that lapse, and elections, on a real etcd."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elastic.errors import Deposed, EtcdUnavailable, NameLost
from elastic.membership.claim import Claim
from elastic.membership.election import Election
from tests.etcd_access import EtcdClient


def holder(client: EtcdClient) -> str:
    entry = client.get("/elastic/job/incarnation")
    assert entry is not None
    return json.loads(entry.value or "")["incarnation"]


def claims(client: EtcdClient) -> tuple[Claim, Claim]:
    """The claim of a job that trains, whose name has lapsed, and that of one that has taken the name meanwhile."""
    trains, founds = Claim(client, "job", "first", shared=True), Claim(client, "job", "second", shared=True)
    assert trains.take_or_join(client.grant(30))
    client.put("/elastic/job/first/view", "a view")
    client.delete(trains.key)
    assert founds.take_or_join(client.grant(30))
    return trains, founds


def test_a_job_that_trains_takes_its_name_again_from_one_that_has_no_view(client: EtcdClient) -> None:
    trains, founds = claims(client)
    assert not trains.keep()
    trains.retake(client.grant(30), trains=True)
    assert holder(client) == "first"
    assert trains.keep()
    assert not founds.keep()
    with pytest.raises(NameLost, match="another job has taken its name 'job'"):
        founds.retake(client.grant(30))
    with pytest.raises(NameLost):
        founds.retake(client.grant(30), trains=True)


def test_it_does_not_take_it_from_one_that_trains(client: EtcdClient) -> None:
    trains, _ = claims(client)
    client.put("/elastic/job/second/view", "a view")
    with pytest.raises(NameLost):
        trains.retake(client.grant(30), trains=True)
    with pytest.raises(NameLost):
        trains.join()
    assert holder(client) == "second"


def test_one_that_commits_its_view_at_that_moment_keeps_the_name(client: EtcdClient) -> None:
    class Interfering:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def transaction(self, *given: Any, **more: Any) -> int:
            client.put("/elastic/job/second/view", "a view")
            return client.transaction(*given, **more)

    claims(client)
    store: Any = Interfering()
    with pytest.raises(EtcdUnavailable, match="changed while it was read"):
        Claim(store, "job", "first", shared=True).retake(client.grant(30), trains=True)
    assert holder(client) == "second"


@pytest.mark.parametrize("shared", [False, True])
def test_a_claim_whose_answer_was_lost_is_found_and_has_the_lease_of_the_next_try(client: EtcdClient, shared: bool) -> None:
    claim, leases = Claim(client, "job", "first", shared=shared), [client.grant(30) for _ in range(2)]
    for lease in leases:
        assert claim.take_or_join(lease) if shared else claim.take(lease) is None
    entry = client.get(claim.key)
    assert entry is not None
    assert entry.lease == leases[1]
    if shared:
        assert claim.leases == (leases[1],)


def test_the_coordinator_stays_elected_under_a_new_lease_and_address(client: EtcdClient) -> None:
    lease = [client.grant(30), client.grant(30)]
    mine = Election(client, "/elastic/job/first/coordinator", "a", lambda: lease[-1], ["10.0.0.1", 1])
    other = Election(client, "/elastic/job/first/coordinator", "b", lambda: client.grant(30), ["10.0.0.2", 1])
    held = mine.hold()
    assert mine.hold() == held, "nothing is written again"
    lease.pop()
    assert mine.hold() != held
    entry = client.get("/elastic/job/first/coordinator")
    assert entry is not None
    assert entry.lease == lease[0]
    mine.address = ["10.0.0.3", 1]
    mine.hold()
    leader = other.leader()
    assert leader is not None
    assert leader.address == ["10.0.0.3", 1]
    with pytest.raises(Deposed):
        other.hold()
