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
from functools import lru_cache
from typing import NamedTuple

from elastic.plan.routing import root
from elastic.plan.workload import Workload


def order(workload: Workload, routes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns all micro-batches in the order in which they are dealt out: the i-th of a path's n at (i + 1/2) / n of the step."""
    paths: dict[tuple[int, ...], list[int]] = {}
    for grain, path in enumerate(zip(*routes, strict=True)):
        paths.setdefault(path, []).extend(workload.micro_batches_of(grain))
    turns = [((place + 0.5) / len(own), own[0], micro_batch) for own in paths.values() for place, micro_batch in enumerate(own)]
    return tuple(micro_batch for _, _, micro_batch in sorted(turns))


def bounds(routes: Sequence[Sequence[int]], *, dealt: bool, eager: int = 0) -> tuple[int, ...]:
    """Returns how many micro-batches a worker of each stage may hold: S - s, and if they are `dealt` out at least the workers from its
    stage on for each worker of its stage. Workers without a grain do not count. An `eager` schedule adds up to so many to that
    (`elastic.plan.eager`)."""
    depth, widths = len(routes), [len(set(route)) for route in routes]
    least = [depth - stage for stage in range(depth)]
    if dealt:
        least = [max(one, -(-sum(widths[stage:]) // widths[stage])) for stage, one in enumerate(least)]
    return tuple(bound + min(eager, depth - 1 - stage) for stage, bound in enumerate(least))


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


def sums(workload: Workload, routes: Sequence[Sequence[int]], *, dealt: bool) -> tuple[dict[int, int], ...]:
    """Returns for each stage how many sums of gradients each worker with a grain holds at most at once: subtrees of the tree over grains,
    and grains under way."""
    if not dealt:
        return tuple({worker: _ascending(tuple(own), workload.grains) for worker, own in _grains(route).items()} for route in routes)
    turns, found = _turns(workload, routes), list[dict[int, int]]()
    for route in routes:
        own: dict[int, list[_Turn]] = {}
        for turn in turns:
            own.setdefault(route[turn.grain], []).append(turn)
        found.append({worker: _most_sums(each, workload.grains) for worker, each in own.items()})
    return tuple(found)


class _Turn(NamedTuple):
    """The first or the last micro-batch of a grain, in the order of `order`."""

    at: float
    path: int
    grain: int
    ends: bool


def _turns(workload: Workload, routes: Sequence[Sequence[int]]) -> list[_Turn]:
    size, paths = workload.micro_batches // workload.grains, dict[tuple[int, ...], list[int]]()
    for grain, path in enumerate(zip(*routes, strict=True)):
        paths.setdefault(path, []).append(grain)
    return sorted(
        _Turn((place * size + ends * (size - 1) + 0.5) / (len(own) * size), own[0], grain, ends)
        for own in paths.values()
        for place, grain in enumerate(own)
        for ends in (False, True)
    )


def _grains(route: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for grain, worker in enumerate(route):
        found.setdefault(worker, []).append(grain)
    return found


@lru_cache(4096)
def _ascending(own: tuple[int, ...], grains: int) -> int:
    """Searches ask for the same runs of grains again and again."""
    return _most_sums([_Turn(0.0, 0, grain, ends) for grain in own for ends in (False, True)], grains)


def _most_sums(turns: Sequence[_Turn], grains: int) -> int:
    """Returns the most sums that exist at once if a worker has these turns.

    Sums are merged as `engine.reduction.NodeSums` does it: as far as possible, but for the root's children. Nodes have the numbers of a
    binary heap: 1 is the root, and 2 n and 2 n + 1 are the children of n.
    """
    first_leaf, nodes = 1 << root(grains).level, set[int]()
    most = under_way = 0
    for _, _, grain, ends in turns:
        if not ends:
            under_way += 1
            most = max(most, len(nodes) + under_way)
            continue
        under_way -= 1
        node, first, size = first_leaf + grain, first_leaf, 1
        while node > 1:
            sibling = node ^ 1
            if (sibling - first) * size < grains:  # otherwise the parent is its only child
                if sibling not in nodes or node < 4:
                    break
                nodes.remove(sibling)
            node, first, size = node >> 1, first >> 1, size << 1
        nodes.add(node)
    return most
