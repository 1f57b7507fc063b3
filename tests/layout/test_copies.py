"""Tests layouts with any number of copies: each on another host, in another rack while there are enough, and dealt evenly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_strategies import models, stages_for

from elastic.layout.invariants import check
from elastic.layout.layout import Layout, spread
from elastic.layout.regions import BLOCK, LayerSpec, ModelSpec
from elastic.layout.replicas import EXCESS, Spots, replica_holders
from elastic.layout.transfer import holdings_of, minimum_by_layer, transfers
from elastic.plan.site import Site

HOSTS = ("a1", "a2", "b1", "b2", "c1")
STATES = ("param", "exp_avg")
some = settings(max_examples=30, deadline=None)


@st.composite
def sites(draw: Any) -> tuple[dict[str, str], int]:
    """The racks of some hosts, and a number of copies."""
    return {host: draw(st.sampled_from("xyz")) for host in HOSTS if draw(st.booleans())}, draw(st.integers(1, 5))


def laid(
    model: ModelSpec,
    stages: Sequence[tuple[range, Sequence[int]]],
    hosts: Mapping[int, str],
    racks: Mapping[str, str],
    copies: int,
    near: Layout | None = None,
) -> Layout:
    here = {worker: hosts[worker] for _, members in stages for worker in members}
    return spread(model, stages, Site(racks=racks).apart(here), near, outlive=True, copies=copies, hosts=here)


def assert_apart(layout: Layout, hosts: Mapping[int, str], racks: Mapping[str, str], copies: int) -> None:
    """Written without the code under test: what there should be is counted."""
    there = {hosts[worker] for worker in layout.workers}
    everywhere = {racks.get(host, f"of {host} alone") for host in there}
    for layer in layout.layers:
        for interval in layer.intervals:
            holding = [hosts[worker] for worker in (interval.owner, *interval.replicas)]
            assert len(holding) == len(set(holding)) == min(copies, len(there))
            assert len({racks.get(host, f"of {host} alone") for host in holding}) == min(len(holding), len(everywhere))


def assert_survives(layout: Layout, hosts: Mapping[int, str], copies: int) -> None:
    """Whichever hosts are lost, one fewer than there are copies: others have all of the state."""
    there = sorted({hosts[worker] for worker in layout.workers})
    for gone in combinations(there, min(copies, len(there)) - 1):
        alive = [worker for worker in layout.workers if hosts[worker] not in gone]
        after = spread(layout.model, [(range(layout.model.depth), alive)])
        held = holdings_of(layout, STATES, alive)
        moved = sum(move.elements for move in transfers(held, after, STATES))  # raises CoverageLost
        assert moved == sum(minimum_by_layer(held, after, STATES).values())


@pytest.mark.slow
@some
@given(st.data())
def test_copies_are_apart_and_survive_the_loss_of_all_but_one_of_their_hosts(data: Any) -> None:
    model, workers = data.draw(models()), data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True))
    hosts = {worker: data.draw(st.sampled_from(HOSTS)) for worker in workers}
    racks, copies = data.draw(sites())
    layout = laid(model, data.draw(stages_for(model, workers)), hosts, racks, copies)
    for epoch in range(data.draw(st.integers(0, 4))):
        check(layout, replicated=False)
        assert_apart(layout, hosts, racks, copies)
        assert_survives(layout, hosts, copies)
        assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
        alive = data.draw(st.permutations(layout.workers))[: data.draw(st.integers(1, len(layout.workers)))]
        members = [*alive, *(1000 + 10 * epoch + i for i in range(data.draw(st.integers(0, 3))))]
        hosts = {**{worker: data.draw(st.sampled_from(HOSTS)) for worker in members if worker not in hosts}, **hosts}
        layout = laid(model, data.draw(stages_for(model, members)), hosts, racks, copies, layout)
        assert all(len(layer.intervals) <= 2 * len(layer.members) for layer in layout.layers)
    assert_apart(layout, hosts, racks, copies)


@some
@given(st.data())
def test_owners_do_not_depend_on_the_number_of_copies(data: Any) -> None:
    model, workers = data.draw(models()), data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True))
    hosts, stages = {worker: data.draw(st.sampled_from(HOSTS)) for worker in workers}, data.draw(stages_for(model, workers))
    two, more = (laid(model, stages, hosts, {}, copies) for copies in (2, data.draw(st.integers(1, 5))))
    assert [[(i.run, i.owner) for i in layer.intervals] for layer in two.layers] == [
        [(i.run, i.owner) for i in layer.intervals] for layer in more.layers
    ]
    assert all(a.replicas[:1] == b.replicas[:1] or not b.replicas for a, b in zip(*(_intervals(each) for each in (two, more)), strict=True))


def _intervals(layout: Layout) -> list[Any]:
    return [interval for layer in layout.layers for interval in layer.intervals]


def kept(layout: Layout) -> Counter[int]:
    found = Counter(dict.fromkeys(layout.workers, 0))
    for interval in _intervals(layout):
        found.update(dict.fromkeys(interval.replicas, interval.elements))
    return found


def one_stage(layers: int, workers: Sequence[int]) -> list[tuple[range, Sequence[int]]]:
    return [(range(layers), workers)]


def model_of(layers: int, blocks: int = 60) -> ModelSpec:
    return ModelSpec(layers=tuple(LayerSpec.build(i, [("weight", (blocks * BLOCK,), "float32")]) for i in range(layers)))


@pytest.mark.parametrize("per_host", [1, 2, 4])
@pytest.mark.parametrize(("count", "copies"), [(3, 3), (4, 3), (5, 4), (5, 5)])
def test_copies_are_dealt_evenly_when_hosts_are_equal(per_host: int, count: int, copies: int) -> None:
    hosts = {worker: HOSTS[worker % count] for worker in range(per_host * count)}
    layout = laid(model_of(3), one_stage(3, range(len(hosts))), hosts, {}, copies)
    elements = 3 * 60 * BLOCK * (copies - 1) / len(hosts)
    assert all(abs(each - elements) <= copies * BLOCK for each in kept(layout).values())


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1), (4, 2, 2), (3, 2, 1, 1), (5, 2, 2, 1), (4, 1, 1, 1, 1), (3, 3, 1, 1)])
def test_no_worker_keeps_much_more_than_others_when_hosts_are_unequal(sizes: tuple[int, ...]) -> None:
    """Two are the mean. Copies of the largest host's state must all be on the few workers elsewhere."""
    hosts = dict(enumerate(HOSTS[number] for number, size in enumerate(sizes) for _ in range(size)))
    found = replica_holders(Spots(tuple(hosts), hosts, copies=3, outlive=True))
    assert max(Counter(holder for holders in found.values() for holder in holders).values()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "copies"),
    [pytest.param(lost, n, marks=[] if (lost, n) == ("b1", 3) else [pytest.mark.long]) for n in (2, 3, 4) for lost in HOSTS],
)
def test_the_loss_of_a_host_and_its_return_leave_copies_even_and_mostly_in_place(lost: str, copies: int) -> None:
    hosts = {worker: HOSTS[worker % 5] for worker in range(10)}
    first = laid(model_of(12), one_stage(12, range(10)), hosts, {}, copies)
    alive = [worker for worker in range(10) if hosts[worker] != lost]
    fewer = laid(model_of(12), one_stage(12, alive), hosts, {}, copies, first)
    hosts |= {20: lost, 21: lost}
    again = laid(model_of(12), one_stage(12, [*alive, 20, 21]), hosts, {}, copies, fewer)
    everything = 12 * 60 * BLOCK
    for layout in (fewer, again):
        mean, share = everything / len(layout.workers), max(Counter(_owned(layout)).values())
        assert max(kept(layout).values()) <= (copies - 1) * max(EXCESS * mean, share) + BLOCK
        assert_survives(layout, hosts, copies)
    moved = sum(move.elements for move in transfers(holdings_of(first, ["exp_avg"], alive), fewer, ["exp_avg"]))
    assert moved <= 1.5 * copies * everything / 5, "what the lost host had is made again, and little else"


def _owned(layout: Layout) -> Counter[int]:
    found: Counter[int] = Counter()
    for interval in _intervals(layout):
        found[interval.owner] += interval.elements
    return found


def test_a_host_that_joins_gets_the_third_copy() -> None:
    hosts = {0: "a1", 1: "a1", 2: "b1", 3: "b1"}
    two = laid(model_of(4), one_stage(4, range(4)), hosts, {}, 3)
    assert {len(interval.replicas) for interval in _intervals(two)} == {1}
    three = laid(model_of(4), one_stage(4, range(5)), {**hosts, 4: "c1"}, {}, 3, two)
    assert_apart(three, {**hosts, 4: "c1"}, {}, 3)


def test_another_number_of_copies_changes_a_layout_that_could_stay() -> None:
    hosts = {0: "a1", 1: "b1", 2: "c1"}
    layouts = [laid(model_of(4), one_stage(4, range(3)), hosts, {}, copies) for copies in (1, 2, 3)]
    for near in layouts:
        for copies, expected in enumerate(layouts, 1):
            found = laid(model_of(4), one_stage(4, range(3)), hosts, {}, copies, near)
            assert (found is near) == (near is expected)
            assert_apart(found, hosts, {}, copies)


def test_without_segments_workers_of_one_host_keep_copies_of_each_other() -> None:
    layout = spread(model_of(4), one_stage(4, range(4)), dict.fromkeys(range(4), "a1"), copies=3, hosts=dict.fromkeys(range(4), "a1"))
    assert all(len({i.owner, *i.replicas}) == 3 for i in _intervals(layout))
    assert set(kept(layout).values()) == {2 * 4 * 15 * BLOCK}
