"""Deals micro-batches out: the order in which all workers run them, where stages have different numbers of workers.

Routes are contiguous runs of grains. If every worker runs its own in ascending order, a narrow stage serves the workers of a wide one one
after the other, and all but one of these wait. Dealt out, each *path* (the workers of one micro-batch, one a stage) gets its turns evenly
over the step, and so does each worker, since its micro-batches are those of whole paths. The order is the same for all workers, so a
schedule cannot deadlock (`elastic.plan.schedule`). Micro-batches of a grain stay in ascending order. Where every worker is on one path, as
with equal widths, nothing changes.

A worker of a narrow stage may hold more micro-batches than 1F1B's S - s: while one of its own goes up and comes back, through stages of
more workers, it is needed for others. A micro-batch takes about as long at a stage as that stage has workers, if stages are balanced; so
the bound is the workers from its stage on, for each worker of its stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic.plan.routing import Node, root
from elastic.plan.workload import Workload


def order(workload: Workload, routes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns all micro-batches in the order in which they are dealt out: the i-th of a path's n at (i + 1/2) / n of the step."""
    paths: dict[tuple[int, ...], list[int]] = {}
    for grain, path in enumerate(zip(*routes, strict=True)):
        paths.setdefault(path, []).extend(workload.micro_batches_of(grain))
    turns = [((place + 0.5) / len(own), own[0], micro_batch) for own in paths.values() for place, micro_batch in enumerate(own)]
    return tuple(micro_batch for _, _, micro_batch in sorted(turns))


def bounds(routes: Sequence[Sequence[int]], *, dealt: bool) -> tuple[int, ...]:
    """Returns how many micro-batches a worker of each stage may hold: S - s, and if they are `dealt` out at least the workers from its
    stage on for each worker of its stage. Workers without a grain do not count."""
    depth, widths = len(routes), [len(set(route)) for route in routes]
    if not dealt:
        return tuple(depth - stage for stage in range(depth))
    return tuple(max(depth - stage, -(-sum(widths[stage:]) // widths[stage])) for stage in range(depth))


def changes(workload: Workload, routes: Sequence[Sequence[int]]) -> bool:
    """Returns whether any schedule can differ if micro-batches are dealt out."""
    if bounds(routes, dealt=True) != bounds(routes, dealt=False):
        return True
    found = order(workload, routes)
    return any(own != sorted(own) for route in routes for own in by_worker(found, workload, route).values())


def by_worker(turns: Sequence[int], workload: Workload, route: Sequence[int]) -> dict[int, list[int]]:
    """Returns the micro-batches of each worker of a route, in this order."""
    found: dict[int, list[int]] = {}
    for micro_batch in turns:
        found.setdefault(route[workload.grain_of(micro_batch)], []).append(micro_batch)
    return found


def sums(own: Sequence[int], workload: Workload) -> int:
    """Returns the most sums of gradients that a worker holds at once if it runs these micro-batches in this order: subtrees of the tree
    over grains, and grains under way."""
    size, top = workload.micro_batches // workload.grains, root(workload.grains)
    nodes: set[Node] = set()
    under_way: dict[int, int] = {}
    most = 0
    for micro_batch in own:
        grain = workload.grain_of(micro_batch)
        under_way[grain] = under_way.get(grain, 0) + 1
        most = max(most, len(nodes) + len(under_way))
        if under_way[grain] == size:
            del under_way[grain]
            _insert(nodes, Node(0, grain), workload.grains, top)
    return most


def _insert(nodes: set[Node], node: Node, grains: int, top: Node) -> None:
    """Adds a node, merged upward as far as possible, but for the root's children (as `engine.reduction.NodeSums` does)."""
    while node != top:
        sibling = Node(node.level, node.index ^ 1)
        if sibling.index << sibling.level < grains:
            if sibling not in nodes or node.parent == top:
                break
            nodes.remove(sibling)
        node = node.parent
    nodes.add(node)
