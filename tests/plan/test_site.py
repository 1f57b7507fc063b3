"""Tests links between hosts, measured or assumed, and their effect on a plan."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import cost, few, fleet, workloads

from elastic.errors import PlanError
from elastic.plan.fleet import SHARE, Fleet
from elastic.plan.job_costs import JobCosts
from elastic.plan.plan import Stage
from elastic.plan.planner import fastest
from elastic.plan.prediction import predict
from elastic.plan.site import BETWEEN, WITHIN, LinkSpeed, Site, pair
from elastic.plan.workload import Workload
from elastic.view import Member

FAST, SLOW = LinkSpeed(latency_s=1e-5, bytes_per_s=8e9), LinkSpeed(latency_s=1e-3, bytes_per_s=1e8)
SITE = Site(links={("a", "a"): FAST, ("a", "b"): SLOW}, places={"a": 2.0}, memory={"b": 1 << 30})

links = st.builds(LinkSpeed, latency_s=st.floats(0, 1), bytes_per_s=st.floats(1, 1e12))
hosts = st.sampled_from("abc")


@given(st.dictionaries(st.builds(pair, hosts, hosts), links), st.dictionaries(hosts, st.floats(0.5, 64)))
def test_json_round_trip_is_exact(measured, places):
    site = Site(links=measured, places=places)
    assert Site.from_json(json.loads(json.dumps(site.to_json()))) == site


@given(st.dictionaries(st.builds(pair, hosts, hosts), links), st.lists(hosts), st.lists(hosts))
def test_the_slowest_is_the_worst_of_all_pairs(measured, some, others):
    site = Site(links=measured)
    found = site.slowest(some, others)
    each = [site.link(one, other) for one in some for other in others]
    assert found.latency_s == max((link.latency_s for link in each), default=WITHIN.latency_s)
    assert found.bytes_per_s == min((link.bytes_per_s for link in each), default=WITHIN.bytes_per_s)
    assert found.measured == (bool(each) and all(link.measured for link in each))


def test_what_nobody_has_measured_is_assumed():
    assert SITE.link("b", "a") == SITE.link("a", "b") == SLOW
    assert (SITE.link("b", "b"), SITE.link("b", "c")) == (WITHIN, BETWEEN)
    assert SITE.slowest(["a"], ["a", "b"]) == SLOW
    assert SITE.knowing({("b", "c"): FAST}).link("c", "b") == FAST
    assert not SITE.slowest(["a", "c"], ["a"]).measured
    assert SLOW.seconds(0) == 0.0


@pytest.mark.parametrize("changes", [{"bytes_per_s": 0.0}, {"bytes_per_s": float("nan")}, {"latency_s": -1.0}])
def test_impossible_links_are_refused(changes):
    with pytest.raises(PlanError, match="measure it again"):
        replace(FAST, **changes)


def test_a_host_without_room_is_refused():
    with pytest.raises(PlanError, match="room for a worker"):
        Site(places={"a": 0.0})


def test_members_have_their_memory_or_a_share_of_their_hosts():
    members = [
        Member(worker=0, host="a", address=""),
        Member(worker=1, host="b", address="", base=1000),
        Member(worker=2, host="b", address="", memory=5000, base=1000, slowdown=2.0),
    ]
    found = Fleet.of(members, SITE)
    assert found.memory == {1: int(SHARE * (1 << 30) / 2) - 1000, 2: 4000}
    assert found.slowdowns == {2: 2.0}
    assert found.link([0], [1]) == SLOW


def boundary(size: int) -> Workload:
    layer = replace(cost(0.01, 0.02, 1000), output_bytes=size)
    return Workload(layers=(layer,) * 4, micro_batches=8, grains=8)


def test_messages_take_their_time_where_the_link_is_slow():
    stages = (Stage(layers=range(2), members=(0,)), Stage(layers=range(2, 4), members=(1,)))
    routes, workload = ((0,) * 8, (1,) * 8), boundary(10_000_000)
    near, far = (fleet([0, 1], hosts={0: "a", 1: other}, site=SITE) for other in ("a", "b"))
    quick, slow = (predict(JobCosts(workload, each), stages, routes).compute_s for each in (near, far))
    assert slow - quick > 2 * SLOW.seconds(10_000_000) - 0.01, "at least the first activation and the last gradient are waited for"


def test_a_slow_link_between_hosts_decides_for_stages_or_against():
    """One boundary with small activations costs less than exchanging large gradients, and the other way round."""
    on = {0: "a", 1: "a", 2: "b", 3: "b"}
    large = Workload(layers=(replace(cost(0.01, 0.02, 50_000_000), output_bytes=1000),) * 4, micro_batches=8, grains=8)
    wide = boundary(100_000_000)
    assert len(fastest(fleet(range(4), hosts=on, site=SITE), large).stages) > 1
    assert len(fastest(fleet(range(4), hosts=on, site=SITE), wide).stages) == 1


def test_more_workers_than_a_host_can_compute_for_do_not_make_a_step_faster():
    workload = boundary(0)
    crowded = fleet(range(4), hosts=dict.fromkeys(range(4), "a"), site=replace(SITE, links={}))
    found = fastest(crowded, workload, 1)
    assert found.step_s >= 8 * 4 * 0.03 / 2
    assert "more workers than it can compute for" in found.why
    assert fastest(fleet(range(4)), workload, 1).step_s < found.step_s


@few
@given(workloads(), st.integers(1, 4))
def test_faster_links_never_make_the_best_plan_slower(workload, workers):
    workload = replace(workload, layers=tuple(replace(layer, output_bytes=5_000_000) for layer in workload.layers))
    found = [
        fastest(fleet(range(workers), hosts=dict.fromkeys(range(workers), "a"), site=Site(links={("a", "a"): link})), workload, 1).step_s
        for link in (FAST, SLOW)
    ]
    assert found[0] <= found[1]
