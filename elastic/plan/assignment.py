"""Assigns workers to the slots of a new plan so that they keep as much as possible of the layers that they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from elastic.plan.plan import Plan, Stage


class Edge(NamedTuple):
    """An old and a new stage with layers in common, and the weight of these layers."""

    old: int
    new: int
    weight: int


def assign(new: Plan, old: Plan, weights: Sequence[int]) -> Plan:
    """Returns `new` with its workers exchanged among themselves, also in its routes, so that least moves.

    It maximises the sum, over workers, of the `weights` (one per layer, such as bytes) of the layers that a worker has both in `old` and
    in the result. Members of a stage are in the order of `old`; workers that are not in `old` follow, in the order of `new`.
    """
    place = {worker: i for i, worker in enumerate(old.workers)}
    present = set(new.workers)
    staying = [[worker for worker in stage.members if worker in present] for stage in old.stages]
    chosen: list[list[int]] = [[] for _ in new.stages]
    for (before, after, _), count in _best(
        list(_edges(old, new, weights)), [len(w) for w in staying], [len(s.members) for s in new.stages]
    ):
        chosen[after] += staying[before][:count]
        del staying[before][:count]
    rest = [worker for group in staying for worker in group] + [worker for worker in new.workers if worker not in place]
    stages: list[Stage] = []
    for stage, members in zip(new.stages, chosen, strict=True):
        lacking = len(stage.members) - len(members)
        members += rest[:lacking]
        del rest[:lacking]
        stages.append(replace(stage, members=tuple(sorted(members, key=lambda worker: place.get(worker, len(place))))))
    becomes = {a: b for was, now in zip(new.stages, stages, strict=True) for a, b in zip(was.members, now.members, strict=True)}
    return replace(new, stages=tuple(stages), routes=tuple(tuple(becomes[worker] for worker in route) for route in new.routes))


def _edges(old: Plan, new: Plan, weights: Sequence[int]) -> Iterator[Edge]:
    """Yields edges in ascending order of both stages: each shares a stage with the edge before, or begins where that one ends."""
    for i, before in enumerate(old.stages):
        for j, after in enumerate(new.stages):
            common = range(max(before.layers.start, after.layers.start), min(before.layers.stop, after.layers.stop))
            if common:
                yield Edge(i, j, sum(weights[layer] for layer in common))


def _best(edges: Sequence[Edge], workers: Sequence[int], slots: Sequence[int]) -> list[tuple[Edge, int]]:
    """Returns how many workers use each edge. Exact, because two ordered cuts of the same layers overlap in a chain of edges."""

    @cache
    def best(at: int, left: int, room: int) -> tuple[int, tuple[int, ...]]:
        """The best counts from edge `at` on, if earlier edges leave `left` workers of its old stage and `room` slots of its new one."""
        if at == len(edges):
            return 0, ()
        here = edges[at]
        follower = edges[at + 1] if at + 1 < len(edges) else None
        found: list[tuple[int, tuple[int, ...]]] = []
        for count in range(min(left, room), -1, -1):
            if follower is None:
                value, counts = 0, ()
            else:
                value, counts = best(
                    at + 1,
                    left - count if follower.old == here.old else workers[follower.old],
                    room - count if follower.new == here.new else slots[follower.new],
                )
            found.append((value + count * here.weight, (count, *counts)))
        return max(found)

    if not edges:
        return []
    return list(zip(edges, best(0, workers[edges[0].old], slots[edges[0].new])[1], strict=True))
