"""Tests recoveries with another number of copies than two: what survives, and what the gate refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from elastic.errors import CoverageLost, GateRefused, PlanError
from elastic.layout.layout import Interval
from elastic.plan.site import Site
from elastic.recovery.gate import check_proposal
from elastic.recovery.proposal import Proposal, next_view, propose
from elastic.recovery.resume import resume_step
from elastic.view import View
from tests.recovery.recovering import inventories_of, member, view_of

HOSTS = ("a1", "a2", "b1", "b2")
RACKS = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}


def kept(copies: int, hosts: Sequence[str] = HOSTS, racks: dict[str, str] | None = None, *, segments: bool = True) -> View:
    """A view of eight workers in two stages whose state there is in so many copies."""
    view = view_of(range(8), stages=2, hosts=hosts)
    members = tuple(replace(each, segment=segments) for each in view.members)
    return next_view(replace(view, members=members), 1, members, view.plan, Site(racks=racks or {}, copies=copies))


def without(view: View, gone: Sequence[str]) -> Proposal:
    left = [each.worker for each in view.members if each.host not in gone]
    return propose(last=view, attempt=2, inventories=inventories_of(view, left), joiners={}, stages=None)


@pytest.mark.parametrize("gone", [*combinations(HOSTS, 2)])
def test_any_two_hosts_may_be_lost_where_there_are_three_copies(gone: Sequence[str]) -> None:
    last = kept(3)
    assert (last.copies_kept, last.copies) == (3, "other hosts")
    found = without(last, gone)
    check_proposal(found, last)
    assert (found.restore, found.view.copies_kept, found.view.site.copies) == (None, 2, 3)
    third = next(host for host in HOSTS if host not in gone)
    alone = without(found.view, [third])
    check_proposal(alone, found.view)
    assert (alone.view.copies_kept, alone.view.copies) == (1, "")


def test_two_copies_survive_one_host_and_not_two() -> None:
    last = kept(2)
    assert without(last, ["a1"]).view.copies_kept == 2
    lost = 0
    for gone in combinations(HOSTS, 2):
        try:
            without(last, gone)
        except CoverageLost:
            lost += 1
    assert lost >= 4, "copies of each host's state are on one other host"


@pytest.mark.parametrize("gone", HOSTS)
def test_one_copy_survives_no_host(gone: str) -> None:
    last = kept(1)
    assert (last.copies_kept, last.copies) == (1, "")
    with pytest.raises(CoverageLost, match="more workers were lost at once than there are copies"):
        without(last, [gone])


def test_a_host_that_comes_back_gets_copies_again() -> None:
    two = without(kept(3, HOSTS[:3]), ["b1"]).view
    joiners = {20: replace(member(20, "b1"), segment=True)}
    found = propose(last=two, attempt=3, inventories=inventories_of(two, two.workers), joiners=joiners, stages=None)
    check_proposal(found, two)
    assert (two.copies_kept, found.view.copies_kept) == (2, 3)


def test_owners_go_back_to_what_the_replicas_of_two_lost_hosts_have() -> None:
    """The owner of a run and one holder of its copy are lost in the update; the other one has the step before."""
    last = kept(3)
    left = [each for each in last.workers if last.members[last.place(each)].host in ("a1", "b2")]
    inventories = inventories_of(last, left, step=5, ahead=left)
    assert resume_step(last.layout.model, list(inventories.values())) == 5


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_copies_are_in_both_racks(copies: int) -> None:
    last = kept(copies, racks=RACKS)
    for gone in ("a", "b"):
        found = without(last, [host for host in HOSTS if RACKS[host] == gone])
        check_proposal(found, last)
        assert found.restore is None


GOOD = kept(3, racks=RACKS)
ON = {each.worker: each.host for each in GOOD.members}
FIRST = GOOD.layout.layers[0].intervals[0]


def on(*hosts: str) -> tuple[int, ...]:
    """Other workers than the owner of the first run, on these hosts."""
    found: list[int] = []
    for host in hosts:
        found.append(next(worker for worker in ON if ON[worker] == host and worker not in (FIRST.owner, *found)))
    return tuple(found)


def changed(change: Callable[[Interval], Interval]) -> Proposal:
    found = propose(last=GOOD, attempt=2, inventories=inventories_of(GOOD, GOOD.workers), joiners={}, stages=None)
    layer = found.view.layout.layers[0]
    layer = replace(layer, intervals=(change(layer.intervals[0]), *layer.intervals[1:]))
    layout = replace(found.view.layout, layers=(layer, *found.view.layout.layers[1:]))
    return replace(found, view=replace(found.view, layout=layout))


def test_the_first_run_is_where_these_tests_say() -> None:
    assert ON[FIRST.owner] == "a1"
    check_proposal(changed(lambda run: run), GOOD)


@pytest.mark.parametrize(
    ("replicas", "why"),
    [
        (lambda: on("b1"), "it has 2 copies, not 3"),
        (lambda: (), "it has no replica"),
        (lambda: on("b1", "b1"), "two copies are in one place, b1"),
        (lambda: on("a1", "b1"), "two copies are in one place, a1"),
        (lambda: (FIRST.replicas[0],) * 2, "a worker keeps it twice"),
        (lambda: (*FIRST.replicas[:1], FIRST.owner), f"worker {FIRST.owner} is both its owner and its replica"),
        (lambda: (*FIRST.replicas[:1], 77), "77"),
    ],
)
def test_the_gate_refuses_copies_that_are_too_few_or_too_near(replicas: Callable[[], tuple[int, ...]], why: str) -> None:
    with pytest.raises(GateRefused, match=why):
        check_proposal(changed(lambda run: replace(run, replicas=replicas())), GOOD)


def test_the_gate_refuses_three_copies_in_fewer_racks_than_there_are() -> None:
    three = {"a1": "a", "a2": "b", "b1": "b", "b2": "c"}
    bad = changed(lambda run: replace(run, replicas=on("a2", "b1")))
    with pytest.raises(GateRefused, match="two copies are in one place, rack b"):
        check_proposal(replace(bad, view=replace(bad.view, site=Site(racks=three, copies=3))), GOOD)


def test_more_copies_than_wanted_are_no_error() -> None:
    """A layout keeps what it has until members change."""
    found = changed(lambda run: run)
    check_proposal(replace(found, view=replace(found.view, site=Site(racks=RACKS, copies=2))), GOOD)


def test_a_view_says_how_many_copies_are_wanted() -> None:
    assert View.from_json(json.loads(json.dumps(GOOD.to_json()))) == GOOD
    assert GOOD.site.having(Site(racks={"c1": "c"})).copies == 3
    assert GOOD.site.knowing({}).copies == GOOD.site.renamed({}).copies == 3
    with pytest.raises(PlanError, match="0 copies of the state"):
        Site(copies=0)


@pytest.mark.parametrize(("segments", "kept_copies"), [(True, 1), (False, 3)])
def test_workers_of_one_host_keep_copies_only_if_their_state_dies_with_them(segments: bool, kept_copies: int) -> None:
    view = kept(3, ("a1",), segments=segments)
    assert view.copies_kept == kept_copies
    assert {1 + len(interval.replicas) for layer in view.layout.layers for interval in layer.intervals} == {kept_copies}
