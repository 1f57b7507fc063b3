"""Tests that routes conserve grains, and that the nodes that workers send are the fewest and add up to the one tree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import PlanError
from elastic.plan.routing import Node, even_routes, maximal_nodes, near_routes, root

members_lists = st.lists(st.integers(0, 99), min_size=1, max_size=10, unique=True)


@st.composite
def covered_grains(draw) -> tuple[set[int], int]:
    grains = draw(st.integers(1, 20))
    return draw(st.sets(st.integers(0, grains - 1))), grains


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), members_lists)
def test_near_routes_are_even_and_leave_as_much_as_possible_in_place(before, members):
    routes = near_routes(before, members)
    sizes = {member: routes.count(member) for member in members}
    assert sum(sizes.values()) == len(routes) == len(before)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    stays = sum(a == b for a, b in zip(before, routes, strict=True))
    share, longer = divmod(len(before), len(members))
    over = sum(before.count(member) > share for member in members)
    assert stays == sum(min(before.count(member), share) for member in members) + min(over, longer)


@given(st.integers(1, 30), members_lists.filter(lambda members: len(members) > 1), st.data())
def test_who_stays_keeps_all_its_grains_when_another_one_leaves(grains, members, data):
    before = even_routes(grains, members)
    lost = data.draw(st.sampled_from(members))
    routes = near_routes(before, [member for member in members if member != lost])
    assert all(after == was for was, after in zip(before, routes, strict=True) if was != lost)


def test_grains_of_the_lost_go_to_neighbours():
    assert near_routes([0, 0, 0, 1, 1, 1, 2, 2], [0, 2]) == (0, 0, 0, 0, 2, 2, 2, 2)


@given(st.integers(1, 40), members_lists)
def test_routes_conserve_grains_in_contiguous_near_equal_runs(grains, members):
    routes = even_routes(grains, members)
    assert len(routes) == grains
    sizes = [routes.count(member) for member in members]
    assert sum(sizes) == grains
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [member for member, size in zip(members, sizes, strict=True) for _ in range(size)] == list(routes)


@pytest.mark.parametrize(("grains", "members"), [(0, (1,)), (4, ())])
def test_nothing_to_route_is_refused(grains, members):
    with pytest.raises(PlanError, match="at least one"):
        even_routes(grains, members)


def fewest(node: Node, covered: set[int], grains: int) -> int:
    """From the root down: a covered node counts once, an empty one not, any other is the sum of its halves."""
    here = set(range(node.index << node.level, min((node.index + 1) << node.level, grains)))
    if not here & covered:
        return 0
    if here <= covered:
        return 1
    return sum(fewest(Node(node.level - 1, 2 * node.index + side), covered, grains) for side in (0, 1))


@given(covered_grains())
def test_maximal_nodes_are_the_fewest_that_cover_exactly(case):
    covered, grains = case
    nodes = maximal_nodes(covered, grains)
    assert [g for node in nodes for g in node.grains(grains)] == sorted(covered)
    assert len(nodes) == fewest(root(grains), covered, grains)
    for node in nodes:
        assert node == root(grains) or (node.index ^ 1) << node.level < grains
        assert node == root(grains) or not set(node.parent.grains(grains)) <= covered


@given(st.integers(1, 70))
def test_all_grains_are_the_root(grains):
    assert maximal_nodes(range(grains), grains) == (root(grains),)
    assert list(root(grains).grains(grains)) == list(range(grains))
    if grains > 1:
        assert len(Node(root(grains).level - 1, 0).grains(grains)) < grains


def test_a_node_prints_its_place_and_knows_its_parent():
    assert Node(level=1, index=2).parent == Node(2, 1)
    assert Node(1, 2).grains(5) == range(4, 5)
    assert maximal_nodes([2, 3, 4], 5) == (Node(1, 1), Node(2, 1))


@pytest.mark.parametrize("grain", [-1, 4])
def test_grains_outside_of_the_step_are_refused(grain):
    with pytest.raises(PlanError, match="not among the 4 grains"):
        maximal_nodes([grain], 4)


def tree(node: Node, grains: int) -> object:
    """Returns how a node's sum is built: a grain, or a pair of sums; the second half of the last node may be empty."""
    if node.level == 0:
        return node.index
    halves = [Node(node.level - 1, 2 * node.index + side) for side in (0, 1)]
    parts = [tree(half, grains) for half in halves if half.grains(grains)]
    return parts[0] if len(parts) == 1 else tuple(parts)


@given(st.integers(1, 20), st.data())
def test_what_any_workers_send_adds_up_in_the_order_of_the_one_tree(grains, data):
    routes = data.draw(st.lists(st.integers(0, 3), min_size=grains, max_size=grains))
    covered = [[grain for grain, to in enumerate(routes) if to == worker] for worker in range(4)]
    known = {node: tree(node, grains) for run in covered for node in maximal_nodes(run, grains)}
    while root(grains) not in known:
        node = min(known)
        left, right = Node(node.level, node.index & ~1), Node(node.level, node.index | 1)
        known[node.parent] = (known.pop(left), known.pop(right)) if right.grains(grains) else known.pop(left)
    assert known == {root(grains): tree(root(grains), grains)}
