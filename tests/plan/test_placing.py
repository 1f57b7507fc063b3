"""Tests that workers are placed by the links between their hosts: in a job's search, and for clusters of many zones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_strategies import cost, fleet

from elastic.plan.across_zones import across_zones
from elastic.plan.cluster import Cluster, DeviceKind, Host, Levels
from elastic.plan.curves import Constant
from elastic.plan.deploy import Device, devices
from elastic.plan.division.physical import PhysicalRules
from elastic.plan.division.search import SearchLimits, divide
from elastic.plan.placing import MOST_WORKERS, placed
from elastic.plan.planner import fastest
from elastic.plan.replan import after_loss, plan_for
from elastic.plan.search import asking, searching
from elastic.plan.site import LinkSpeed, Site
from elastic.plan.slicing import finish
from elastic.plan.transformer import Transformer
from elastic.plan.workload import Workload

NEAR, FAR = LinkSpeed(latency_s=1e-5, bytes_per_s=2e9), LinkSpeed(latency_s=1e-3, bytes_per_s=1e8)
SITE = Site(links={("a", "a"): NEAR, ("b", "b"): NEAR, ("a", "b"): FAR})
WORKLOAD = Workload(layers=(replace(cost(0.01, 0.02, 5_000_000), output_bytes=100_000),) * 6, micro_batches=8, grains=8)


def test_members_of_a_stage_that_exchange_much_are_put_on_one_host():
    """Workers of two hosts by turns, as after some losses and joins: the fleet's order has both hosts in every stage."""
    there = fleet(range(4), hosts=dict(enumerate("abab")), site=SITE)
    found = fastest(there, WORKLOAD, 2)
    assert sorted(stage.members for stage in found.stages) == [(0, 2), (1, 3)]
    assert "placed by the links" in found.why
    by_order = fastest(replace(there, hosts=dict(enumerate("aabb"))), WORKLOAD, 2)
    assert found.step_s == pytest.approx(by_order.step_s)
    assert "placed" not in by_order.why


def test_a_pipeline_crosses_the_slow_link_once():
    there = fleet(range(4), hosts=dict(enumerate("abab")), site=SITE)
    large = replace(WORKLOAD, layers=(replace(WORKLOAD.layers[0], output_bytes=10_000_000),) * 6)
    hosts = "".join(there.host(worker) for worker in fastest(there, large, 4).workers)
    assert hosts in ("aabb", "bbaa")


@pytest.mark.parametrize(
    "change",
    [
        {"hosts": {}},
        {"site": Site()},
        {"slowdowns": {1: 2.0}},
        {"memory": {1: 1 << 40}},
        {"workers": tuple(range(MOST_WORKERS + 1))},
    ],
)
def test_where_it_cannot_help_the_order_stays(change):
    there = replace(fleet(range(4), hosts=dict(enumerate("abab")), site=SITE), **change)
    with_memory = {0: 1 << 39, **there.memory} if there.memory else {}
    there = replace(there, memory=with_memory)
    candidates = finish(searching(asking(there, WORKLOAD, 2)))
    assert not any("placed" in candidate.reason for candidate in candidates)
    assert placed(candidates[0].stages[:1], WORKLOAD, there) is None


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=6), st.sampled_from([None, 1, 2, 3]))
def test_placing_never_makes_a_plan_slower_and_keeps_all_workers(hosts, stages):
    stages = None if stages is None else min(stages, len(hosts))
    there = fleet(range(len(hosts)), hosts=dict(enumerate(hosts)), site=SITE)
    found = fastest(there, WORKLOAD, stages)
    assert sorted(found.workers) == list(there.workers)
    question = asking(there, WORKLOAD, stages)
    plain = [each for each in finish(searching(question)) if "placed" not in each.reason]
    assert found.step_s <= min(each.predicted.step_s for each in plain) + 1e-12


SMALL = Transformer(layers=10, hidden=1024, heads=16, sequence=512, vocabulary=8000, utilisation=0.4, sizes=(1, 2))


def zones(*counts: int, kinds: int = 1) -> Cluster:
    """A host in a zone of its own for each count."""
    known = {f"k{number}": DeviceKind(name=f"k{number}", memory_bytes=8 * 2**30, flops=100e12) for number in range(kinds)}
    hosts = tuple(Host(name=f"h{i}", zone=f"z{i}", kind=f"k{i % kinds}", count=count) for i, count in enumerate(counts))
    links = Levels(
        within_host=Constant(bytes_per_s=50e9),
        within_zone=Constant(bytes_per_s=10e9),
        between_zones=Constant(latency_s=1e-4, bytes_per_s=8e9),
    )
    return Cluster(kinds=known, hosts=hosts, links=links)


def test_many_zones_of_one_kind_are_planned_across():
    """The exact search takes a stage's replicas from one zone, so with one device each there would be no replicas, and no end of it."""
    there = zones(*[1] * 12)
    found = plan_for(there, SMALL.profiles(there), 48)
    assert found.division.replicas > 1
    assert not found.idle
    assert found.plan.why.startswith("stages across zones, with devices placed by the links: ")
    assert found.prediction.fits
    assert sorted(found.plan.workers) == list(range(12))
    then = after_loss(found, {Device("h3", 0)}, 48)
    assert Device("h3", 0) not in then.deployed.members
    assert then.move.moved_bytes > 0


def test_where_zones_do_not_divide_stages_across_them_are_faster():
    there = zones(5, 7)
    profiles = SMALL.profiles(there)
    exact = divide(PhysicalRules(there, profiles), 96)
    found = plan_for(there, profiles, 96)
    across = across_zones(PhysicalRules(there, profiles), 96, SearchLimits(), devices(there))
    assert across is not None
    assert found.plan.step_s == min(exact.step_s, across.plan.step_s)


def test_one_zone_or_several_kinds_are_for_the_exact_search():
    for there in (zones(4), zones(4, 4, kinds=2)):
        assert across_zones(PhysicalRules(there, SMALL.profiles(there)), 16, SearchLimits(), devices(there)) is None
