from __future__ import annotations

import numpy as np
import pytest
from comm_cluster import PATIENCE_S, Cluster, together

from elastic.comm import Rounds
from elastic.errors import PeerLost

pytestmark = pytest.mark.timeout(60)


def rounds(c: Cluster, members: list[int], coordinator: int) -> dict[int, Rounds]:
    return {member: Rounds(c[member], member, members, coordinator) for member in members}


@pytest.mark.parametrize("coordinator", [0, 2])
def test_all_apply_what_the_coordinator_decided_of_all(cluster, coordinator):
    c = cluster(3)
    seen: list[dict] = []

    def decide(ready):
        seen.append(ready)
        total = sum(arrays["norms"] for _, arrays in ready.values())
        return {"clip": (1, 2), "workers": sorted(ready)}, {"total": total}

    def commit(me: int, each: Rounds):
        return each.commit(5, ({"loss": 0.1 * me}, {"norms": np.full(3, float(me))}), decide)

    applied = together(*(lambda me=me, each=each: commit(me, each) for me, each in rounds(c, [0, 1, 2], coordinator).items()))
    for value, arrays in applied:
        assert value == {"clip": [1, 2], "workers": [0, 1, 2]}
        assert arrays["total"].tolist() == [3.0, 3.0, 3.0]
    [ready] = seen
    assert [ready[me][0]["loss"] for me in (0, 1, 2)] == [0.0, 0.1, 0.2]


def test_nothing_is_decided_before_all_are_ready(cluster):
    c = cluster(3)
    each = rounds(c, [0, 1, 2], 0)
    decided: list[int] = []

    def decide(ready):
        decided.append(len(ready))
        return {}, None

    leader = c.blocked(0, lambda: each[0].commit(1, ({}, None), decide))
    follower = c.blocked(1, lambda: each[1].commit(1, ({}, None), decide))
    assert not leader.done()
    assert not follower.done()
    assert decided == []
    each[2].commit(1, ({}, None), decide)
    leader.result(PATIENCE_S)
    follower.result(PATIENCE_S)
    assert decided == [3]


def test_rounds_of_consecutive_steps_do_not_mix(cluster):
    c = cluster(2)

    def steps(each: Rounds):
        return [
            each.commit(step, ({"step": step}, None), lambda ready: ({"sum": sum(r[0]["step"] for r in ready.values())}, None))
            for step in range(20)
        ]

    for results in together(*(lambda each=each: steps(each) for each in rounds(c, [0, 1], 0).values())):
        assert [value["sum"] for value, _ in results] == [2 * step for step in range(20)]


def test_gather_and_broadcast(cluster):
    c = cluster(3)

    def both(me: int, each: Rounds):
        gathered = each.gather(9, ({"me": me}, None))
        return gathered, each.broadcast(9, ({"from": me}, {"x": np.arange(me + 2)}))

    results = together(*(lambda me=me, each=each: both(me, each) for me, each in rounds(c, [0, 1, 2], 1).items()))
    assert results[0][0] is results[2][0] is None
    assert {worker: value for worker, (value, _) in results[1][0].items()} == {0: {"me": 0}, 1: {"me": 1}, 2: {"me": 2}}
    assert all(value == {"from": 1} and arrays["x"].tolist() == [0, 1, 2] for _, (value, arrays) in results)


def test_a_single_member_needs_no_link(cluster):
    c = cluster(1)
    before = c[0].stats
    each = Rounds(c[0], 0, [0], 0)
    assert each.commit(1, ({"a": (1,)}, None), lambda ready: ready[0])[0] == {"a": [1]}
    assert each.gather(1, ({}, None)) == {0: ({}, {})}
    assert c[0].stats == before


def test_a_lost_member_ends_the_round_for_all(cluster):
    c = cluster(3)
    each = rounds(c, [0, 1, 2], 0)
    decided: list[bool] = []
    waits = [c.blocked(me, lambda me=me: each[me].commit(1, ({}, None), lambda ready: decided.append(True))) for me in (0, 1)]
    c[2].close()
    for wait in waits:
        with pytest.raises(PeerLost):
            wait.result(PATIENCE_S)
    assert decided == []


def test_the_coordinator_must_have_something_to_say(cluster):
    c = cluster(1)
    with pytest.raises(ValueError, match="coordinator"):
        Rounds(c[0], 0, [0], 0).broadcast(1, None)
