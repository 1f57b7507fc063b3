"""Routes: which worker of a stage computes which grain, and which partial sums of the gradient tree it can send.

The tree over grains is binary and fixed: node `(level, index)` is the sum over grains `[index << level, (index + 1) << level)`, cut off
at the number of grains. A worker sends the sums of the maximal nodes that its grains cover; the owner adds them in tree order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from elastic.errors import PlanError


class Node(NamedTuple):
    """One partial sum of the gradient tree."""

    level: int
    index: int

    @property
    def parent(self) -> Node:
        """The sum of this node and its sibling."""
        return Node(self.level + 1, self.index >> 1)

    def grains(self, grains: int) -> range:
        """The grains that the node covers, of `grains` in total."""
        return range(min(self.index << self.level, grains), min((self.index + 1) << self.level, grains))


def even_routes(grains: int, members: Sequence[int]) -> tuple[int, ...]:
    """Returns the worker of each grain: contiguous runs in member order, whose sizes differ by at most one, the longer ones first."""
    if grains < 1 or not members:
        raise PlanError(f"cannot route {grains} grains to {len(members)} workers: both must be at least one")
    share, longer = divmod(grains, len(members))
    return tuple(worker for place, worker in enumerate(members) for _ in range(share + (place < longer)))


def weighted_shares(grains: int, slowdowns: Sequence[float]) -> tuple[int, ...]:
    """Returns how many grains each worker computes so that the last one ends as early as possible; a grain takes `slowdown` units of time.

    Exact: each grain goes to the worker that would finish it first; the earlier one of equals.
    """
    if grains < 1 or not slowdowns or not all(math.isfinite(slowdown) and slowdown > 0 for slowdown in slowdowns):
        raise PlanError(f"cannot route {grains} grains to workers with slowdowns {list(slowdowns)}: these must be above 0 and finite")
    shares = [0] * len(slowdowns)
    ends = [(slowdown, place) for place, slowdown in enumerate(slowdowns)]
    heapq.heapify(ends)
    for _ in range(grains):
        _, place = ends[0]
        shares[place] += 1
        heapq.heapreplace(ends, ((shares[place] + 1) * slowdowns[place], place))
    return tuple(shares)


def weighted_routes(grains: int, members: Sequence[int], slowdowns: Mapping[int, float]) -> tuple[int, ...]:
    """Returns the worker of each grain: contiguous runs in member order, of the lengths that `weighted_shares` returns."""
    shares = weighted_shares(grains, [slowdowns.get(member, 1.0) for member in members])
    return tuple(member for member, share in zip(members, shares, strict=True) for _ in range(share))


def near_routes(before: Sequence[int], members: Sequence[int], slowdowns: Mapping[int, float] | None = None) -> tuple[int, ...]:
    """Returns even or weighted routes to `members` that leave as many grains as possible with their worker in `before`.

    This keeps the work of members on an interrupted step. `before` may name other workers. Each other grain, ascending, goes to the member
    with free room that has the nearest grain.
    """
    grains = len(before)
    kept: dict[int, list[int]] = {member: [] for member in members}
    had = {member: sum(worker == member for worker in before) for member in members}
    most_first = sorted(members, key=lambda member: -had[member])
    shares = weighted_shares(grains, [(slowdowns or {}).get(member, 1.0) for member in most_first])
    room = dict(zip(most_first, shares, strict=True))
    for grain, worker in enumerate(before):
        if worker in kept and len(kept[worker]) < room[worker]:
            kept[worker].append(grain)
    taken = {grain: worker for worker, own in kept.items() for grain in own}
    for grain in range(grains):
        if grain not in taken:
            free = [member for member in members if len(kept[member]) < room[member]]
            nearest = min(free, key=lambda member: (min((abs(grain - own) for own in kept[member]), default=grains), members.index(member)))
            kept[nearest].append(grain)
            taken[grain] = nearest
    return tuple(taken[grain] for grain in range(grains))


def root(grains: int) -> Node:
    """Returns the node that covers all grains, on the lowest possible level."""
    return Node((grains - 1).bit_length(), 0)


def maximal_nodes(grains_covered: Iterable[int], grains: int) -> tuple[Node, ...]:
    """Returns the fewest nodes that together cover exactly these grains, ascending.

    The tree is cut off at the number of grains, so nodes of several levels may cover the same grains: then it is the highest of them.
    Every node except the root therefore has a non-empty sibling. Raises PlanError on a grain outside `[0, grains)`.
    """
    level, top = 0, root(grains).level
    nodes = {grain: Node(0, grain) for grain in grains_covered}
    if outside := [grain for grain in nodes if not 0 <= grain < grains]:
        raise PlanError(f"grains {outside} are not among the {grains} grains of the step")
    # `nodes` maps the index at the present level to the largest complete node there.
    done: list[Node] = []
    while level < top:
        parents: dict[int, Node] = {}
        for index, node in nodes.items():
            sibling_is_empty = (index ^ 1) << level >= grains
            if sibling_is_empty or index ^ 1 in nodes:
                parents[index >> 1] = node.parent
            else:
                done.append(node)
        nodes, level = parents, level + 1
    return tuple(sorted([*done, *nodes.values()], key=lambda node: node.grains(grains).start))
