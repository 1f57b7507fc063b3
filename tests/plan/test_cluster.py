"""Tests clusters: round trips, look-ups of links, and refusals by name."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from cluster_files import cluster_json, curve_json
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import PlanError
from elastic.plan.cluster import Cluster, DeviceKind, Host, Levels, LinkEnd, LinkMatrix
from elastic.plan.curves import Constant, Polynomial, Table, curve_from_json

FAST, SLOW = Constant(latency_s=0.001, bytes_per_s=1e9), Constant(latency_s=0.1, bytes_per_s=1e6)
KINDS = {"a": DeviceKind(name="a", memory_bytes=1e9, flops=1e12), "b": DeviceKind(name="b", memory_bytes=2e9)}

finite = st.floats(1e-3, 1e12)
curves = st.one_of(
    st.builds(Constant, latency_s=st.floats(0, 1), bytes_per_s=finite),
    st.builds(Polynomial, coefficients=st.lists(st.floats(-10, 10), min_size=1, max_size=3).map(tuple)),
    st.lists(finite, min_size=1, max_size=4, unique=True).map(lambda sizes: Table(sizes=tuple(sorted(sizes)), bytes_per_s=tuple(sizes))),
)


def host(name: str = "h0", zone: str = "z", kind: str = "a", count: int = 2) -> Host:
    return Host(name=name, zone=zone, kind=kind, count=count)


def cluster(*hosts: Host, links: Levels | LinkMatrix | None = None) -> Cluster:
    return Cluster(kinds=KINDS, hosts=hosts, links=links or Levels(within_host=FAST, within_zone=FAST, between_zones=SLOW))


@given(curves)
def test_curves_survive_json(curve):
    assert curve_from_json(json.loads(json.dumps(curve_json(curve))), "link") == curve


@given(curves, st.floats(1, 1e12))
def test_no_message_takes_a_negative_time_and_none_takes_none(curve, size):
    assert curve.seconds([size, 0.0])[0] > 0
    assert curve.seconds([size, 0.0])[1] == 0


def test_curves_by_size():
    assert float(Constant(latency_s=1.0, bytes_per_s=2.0).seconds(6)) == 4.0
    assert np.allclose(Table(sizes=(10, 30), bytes_per_s=(1.0, 3.0)).seconds([5, 20, 60]), [5, 10, 20])
    assert float(Polynomial(coefficients=(1.0, 2.0)).seconds(4e6)) == pytest.approx(4e-3 / 4)
    assert math.isinf(Polynomial(coefficients=(1.0, 0.0)).seconds(5e5))
    assert math.isinf(Polynomial(coefficients=(5e-324,)).seconds(1.0))


def test_a_cluster_survives_json():
    matrix = LinkMatrix(curves={(LinkEnd("z", "a"), LinkEnd("z", "a")): FAST, (LinkEnd("z", "a", 2), LinkEnd("z", "a")): SLOW})
    for found in (cluster(host(), host("h1", "y", "b")), cluster(host(), host("h1"), links=matrix)):
        assert Cluster.from_json(json.loads(json.dumps(cluster_json(found)))) == found


def test_links_are_looked_up_by_level():
    links = Levels(within_host=FAST, within_zone=SLOW, between_zones=None)
    assert links.curve(LinkEnd("z", "a", 1, "h"), LinkEnd("z", "a", 1, "h")) == FAST
    assert links.curve(LinkEnd("z", "a", 1, "h"), LinkEnd("z", "b", 1, "i")) == SLOW
    with pytest.raises(PlanError, match="2 a in z at h and 1 b in y are not connected: there is no link between_zones"):
        links.curve(LinkEnd("z", "a", 2, "h"), LinkEnd("y", "b"))


def test_counts_and_devices():
    found = cluster(host(), host("h1"), host("h2", "y", "b", 3))
    assert found.counts() == {("a", "z"): 4, ("b", "y"): 3}
    assert found.devices == 7


def test_what_cannot_be_a_cluster_is_refused():
    with pytest.raises(PlanError, match="this one has none"):
        cluster()
    with pytest.raises(PlanError, match="host h0 has 0 devices"):
        host(count=0)
    with pytest.raises(PlanError, match="kind c, which is not among"):
        cluster(host(kind="c"))
    with pytest.raises(PlanError, match="two hosts have the name h0"):
        cluster(host(), host())
    with pytest.raises(PlanError, match="are not connected"):
        cluster(host(), host("h1", "y"), links=Levels(within_host=FAST, within_zone=FAST))
    with pytest.raises(PlanError, match="no link within_host"):
        cluster(host(), links=Levels(within_zone=FAST))
    with pytest.raises(PlanError, match="the matrix has no link"):
        cluster(host(), host("h1", kind="b"), links=LinkMatrix(curves={(LinkEnd("z", "a"), LinkEnd("z", "b")): FAST}))


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, math.inf])
def test_impossible_numbers_are_named(value):
    with pytest.raises(PlanError, match="memory_bytes of a is"):
        DeviceKind(name="a", memory_bytes=value)
    with pytest.raises(PlanError, match="bytes_per_s is"):
        Constant(bytes_per_s=value)
    if value != 0:
        with pytest.raises(PlanError, match="latency_s is"):
            Constant(latency_s=value, bytes_per_s=1.0)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("hosts", 0, "count"), "four", r"hosts\[0\].count must be a whole number, not 'four'"),
        (("hosts", 0, "zone"), None, r"hosts\[0\].zone must be a name"),
        (("kinds", 0, "memory_bytes"), "much", r"kinds\[0\].memory_bytes must be a number"),
        (("links", "levels", "within_zone", "bytes_per_s"), [], "links.levels.within_zone.bytes_per_s must be a number"),
        (("links", "levels", "within_zone", "latency_s"), -1, "links.levels.within_zone: latency_s is -1"),
        (("links", "levels"), {"elsewhere": {}}, "links.levels must be a table of within_host"),
        (("hosts",), {}, "hosts must be a list"),
        (("links",), {}, "links.levels is missing"),
    ],
)
def test_a_malformed_file_names_the_field(path, value, named):
    data = json.loads(json.dumps(cluster_json(cluster(host()))))
    spot = data
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = value
    with pytest.raises(PlanError, match=named):
        Cluster.from_json(data)
