"""Tests where copies are kept when hosts stand in racks: a rack that is lost as a whole takes no state with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_strategies import few, models, stages_for

from elastic.errors import GateRefused, SettingsError
from elastic.launch.sharing import rack_of
from elastic.layout.layout import Layout, spread
from elastic.plan.site import Site
from elastic.recovery.gate import check_proposal
from elastic.recovery.proposal import Proposal, next_view, propose
from elastic.view import View
from tests.recovery.recovering import inventories_of, member, view_of

HOSTS = ("a1", "a2", "b1", "b2")
RACKS = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}


@st.composite
def sites(draw: Any, workers: Sequence[int]) -> tuple[dict[int, str], dict[str, str]]:
    """The hosts of workers, and the racks of some of these hosts."""
    hosts = {worker: draw(st.sampled_from(HOSTS)) for worker in workers}
    return hosts, {host: draw(st.sampled_from("xyz")) for host in HOSTS if draw(st.booleans())}


def lost_with(layout: Layout, gone: set[int]) -> list[tuple[int, int, int]]:
    """The runs of which both copies are with workers that are gone."""
    return [(each.layer, i.start, i.stop) for each in layout.layers for i in each.intervals if {i.owner, *i.replicas} <= gone]


def assert_survives(layout: Layout, hosts: Mapping[int, str], racks: Mapping[str, str]) -> None:
    """The layout loses nothing with all hosts of a rack, nor with a host, as long as there is any other."""
    places = [{host for host, rack in racks.items() if rack == name} for name in set(racks.values())] + [{host} for host in HOSTS]
    for place in places:
        gone = {worker for worker in layout.workers if hosts[worker] in place}
        if len(gone) < len(layout.workers):
            assert lost_with(layout, gone) == []


@pytest.mark.slow
@few
@given(st.data())
def test_no_rack_and_no_host_takes_both_copies_with_it_whatever_happened_before(data: Any) -> None:
    model, workers = data.draw(models()), data.draw(st.lists(st.integers(0, 50), min_size=2, max_size=7, unique=True))
    hosts, racks = data.draw(sites(workers))
    layout = spread(model, data.draw(stages_for(model, workers)), Site(racks=racks).apart(hosts), outlive=data.draw(st.booleans()))
    for epoch in range(data.draw(st.integers(0, 4))):
        alive = data.draw(st.permutations(layout.workers))[: data.draw(st.integers(1, len(layout.workers)))]
        members = [*alive, *(1000 + 10 * epoch + i for i in range(data.draw(st.integers(0, 2))))]
        more, named = data.draw(sites([worker for worker in members if worker not in hosts]))
        hosts, racks = {**hosts, **more}, {**named, **racks}  # the rack of a host does not change
        stages, outlive = data.draw(stages_for(model, members)), data.draw(st.booleans())
        apart = Site(racks=racks).apart({worker: hosts[worker] for worker in members})
        before, layout = layout, spread(model, stages, apart, near=layout, outlive=outlive)
        assert layout == spread(model, stages, dict(reversed(apart.items())), near=before, outlive=outlive)
        if len(members) > 1 and len({hosts[worker] for worker in members}) > 1:
            assert_survives(layout, hosts, racks)


def test_a_host_that_names_no_rack_is_a_rack_of_its_own() -> None:
    hosts = dict(enumerate(HOSTS))
    assert len(set(Site(racks={"a1": "a", "a2": "a"}).apart(hosts).values())) == 3
    assert Site().apart(hosts) == Site(racks=dict.fromkeys(HOSTS, "a")).apart(hosts)  # nothing to choose from: other hosts
    assert len(set(Site(racks={"a1": "a2"}).apart(hosts).values())) == 4  # a rack may be called like a host


def racked(view: View, racks: Mapping[str, str] = RACKS) -> View:
    """The view with hosts in racks, and copies where they belong."""
    return next_view(view, 1, view.members, view.plan, Site(racks=racks))


LAST = racked(view_of(range(8), stages=2, hosts=HOSTS))


def test_a_view_says_where_copies_are() -> None:
    assert LAST.copies == "other racks"
    assert View.from_json(json.loads(json.dumps(LAST.to_json()))) == LAST
    assert racked(LAST, dict.fromkeys(HOSTS, "a")).copies == "other hosts"
    assert view_of(range(2), hosts=("a1",)).copies == "workers"
    assert view_of([3]).copies == ""


@pytest.mark.parametrize("rack", ["a", "b"])
def test_the_other_rack_goes_on_from_its_copies(rack: str) -> None:
    left = [each.worker for each in LAST.members if RACKS[each.host] != rack]
    found = propose(last=LAST, attempt=1, inventories=inventories_of(LAST, left), joiners={}, stages=None)
    check_proposal(found, LAST)
    assert (found.restore, found.view.workers, found.view.copies) == (None, tuple(left), "other hosts")


def test_copies_go_back_to_other_racks_when_another_rack_is_there() -> None:
    one = propose(last=LAST, attempt=1, inventories=inventories_of(LAST, [0, 1, 4, 5]), joiners={}, stages=None).view
    joined = replace(one, site=one.site.having(Site(racks={"c1": "c"})))
    found = propose(last=joined, attempt=2, inventories=inventories_of(one, one.workers), joiners={9: member(9, "c1")}, stages=None)
    check_proposal(found, joined)
    assert found.view.copies == "other racks"


def test_the_gate_refuses_copies_in_one_rack() -> None:
    good = propose(last=LAST, attempt=1, inventories=inventories_of(LAST, range(7)), joiners={}, stages=None)
    check_proposal(good, LAST)
    hosts = {each.worker: each.host for each in good.view.members}
    layers = [
        replace(each, intervals=tuple(replace(i, replicas=(_neighbour(i.owner, hosts),)) for i in each.intervals))
        for each in good.view.layout.layers
    ]
    bad: Proposal = replace(good, view=replace(good.view, layout=replace(good.view.layout, layers=tuple(layers))))
    with pytest.raises(GateRefused, match=r"both copies are in one place, rack [ab]"):
        check_proposal(bad, LAST)


def _neighbour(owner: int, hosts: Mapping[int, str]) -> int:
    """A worker of another host in the same rack."""
    return next(worker for worker, host in hosts.items() if host != hosts[owner] and RACKS[host] == RACKS[hosts[owner]])


@pytest.mark.parametrize("name", ["rack-7", "eu-west-1a", "hall2/row3/12", "7", "a" * 64])
def test_a_rack_has_a_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_RACK", "elsewhere")
    assert rack_of(name) == name
    assert rack_of(None) == "elsewhere"
    monkeypatch.delenv("ELASTIC_RACK")
    assert rack_of(None) is None


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "rack 7", "rack\n", "-a", "räck", "a\0", "x" * 100_000, 7])
def test_a_bad_name_of_a_rack_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^rack=.{0,100} is no name of a rack: use 1 to 64 letters"):
        rack_of(name)
    if isinstance(name, str) and "\0" not in name:
        monkeypatch.setenv("ELASTIC_RACK", name)
        with pytest.raises(SettingsError, match=re.escape("the environment variable ELASTIC_RACK=")):
            rack_of(None)
