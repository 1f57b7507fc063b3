"""Who owns, replicates and gathers which run of each layer, and the one rule that makes such a layout from a list of stages.

ZeRO is interleaved: every layer is spread over all members of its stage, so a layer that moves to another stage, or a member
that leaves, becomes transfers between many disjoint pairs of workers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.errors import LayoutError
from elastic.layout.regions import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """The run `[start, stop)` (elements) of a layer's vector, the worker that updates it, and the one that keeps a copy."""

    start: int
    stop: int
    owner: int
    replica: int | None = None

    @property
    def elements(self) -> int:
        """Length of the run."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """One layer: the members of its stage, which all hold its parameters, and its intervals in ascending order."""

    layer: int
    members: tuple[int, ...]
    intervals: tuple[Interval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All layers. Nothing is checked here: `elastic.layout.invariants.check` does that."""

    model: ModelSpec
    layers: tuple[LayerLayout, ...]

    @property
    def workers(self) -> tuple[int, ...]:
        """All workers, in the order of their stages."""
        return tuple(dict.fromkeys(worker for layer in self.layers for worker in layer.members))

    def owned(self, worker: int) -> list[tuple[int, Interval]]:
        """`(layer, interval)` of everything that `worker` owns, ascending."""
        return [(layer.layer, interval) for layer in self.layers for interval in layer.intervals if interval.owner == worker]

    def members(self, layer: int) -> tuple[int, ...]:
        """The workers of the layer's stage: all hold its parameters whole."""
        return self.layers[layer].members

    def users(self, layer: int) -> tuple[int, ...]:
        """The members, and behind them the members of other stages that use one of the layer's parameters by a tie."""
        tied = [
            worker
            for other in self.layers[layer + 1 :]
            if any(tie.home == layer for tie in self.model.layers[other.layer].ties)
            for worker in other.members
        ]
        return tuple(dict.fromkeys([*self.members(layer), *tied]))

    def layers_of(self, worker: int) -> tuple[int, ...]:
        """The layers of the worker's stage, ascending."""
        return tuple(layer.layer for layer in self.layers if worker in layer.members)

    def to_json(self) -> dict[str, Any]:
        """Each distinct member list once; intervals as flat `gap, length, owner, replica`, the gap being to the interval before."""
        groups: dict[tuple[int, ...], int] = {}
        layers: list[list[Any]] = []
        for layer in self.layers:
            flat: list[int | None] = []
            position = 0
            for interval in layer.intervals:
                flat += (interval.start - position, interval.elements, interval.owner, interval.replica)
                position = interval.stop
            layers.append([layer.layer, groups.setdefault(layer.members, len(groups)), flat])
        return {"model": self.model.to_json(), "groups": [list(group) for group in groups], "layers": layers}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layout:
        """The inverse of `to_json`."""
        groups = [tuple(group) for group in data["groups"]]
        layers = [LayerLayout(layer=layer, members=groups[group], intervals=_intervals(flat)) for layer, group, flat in data["layers"]]
        return cls(model=ModelSpec.from_json(data["model"]), layers=tuple(layers))


def _intervals(flat: Sequence[Any]) -> tuple[Interval, ...]:
    intervals: list[Interval] = []
    position = 0
    for gap, length, owner, replica in zip(flat[0::4], flat[1::4], flat[2::4], flat[3::4], strict=True):
        start, position = position + gap, position + gap + length
        intervals.append(Interval(start=start, stop=position, owner=owner, replica=replica))
    return tuple(intervals)


def spread(model: ModelSpec, stages: Sequence[tuple[range, Sequence[int]]], hosts: Mapping[int, str] | None = None) -> Layout:
    """Cuts every layer over its stage's members, in near-equal contiguous intervals.

    Shares follow the order of the members, so that a change of their number moves little. What rounding to cut points gives a member
    too much in one layer it gets less in the next: with block cuts, totals stay within a block or two of each other. A replica goes to
    another worker, on another host if `hosts` (worker to host name) knows of one; it is None only when there is a single worker.
    Raises LayoutError unless the stages are non-empty, disjoint in workers, and cover the layers in order.
    """
    _check_stages(len(model.layers), stages)
    replicas = replica_holders([worker for _, members in stages for worker in members], hosts)
    layers: list[LayerLayout] = []
    for run, members in stages:
        totals = dict.fromkeys(members, 0)
        for layer in run:
            layers.append(LayerLayout(layer=layer, members=tuple(members), intervals=_cut(model, layer, totals, replicas)))
    return Layout(model=model, layers=tuple(layers))


def replica_holders(workers: Sequence[int], hosts: Mapping[int, str] | None = None) -> dict[int, int | None]:
    """Who keeps the copy of what each worker owns: a ring, stepped so that it leaves every host where that is possible."""
    host = {worker: worker if hosts is None else hosts[worker] for worker in workers}
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys(host.values()))}
    ring = sorted(workers, key=lambda worker: ranks[host[worker]])
    step = max(Counter(host.values()).values()) if len(ranks) > 1 else 1
    return {worker: _partner(ring, place, step, host) for place, worker in enumerate(ring)}


def _partner(ring: Sequence[int], place: int, step: int, host: Mapping[int, int | str]) -> int | None:
    worker, other = ring[place], ring[(place + step) % len(ring)]
    if host[other] != host[worker]:
        return other
    # More than half of all workers share this host: their copies are dealt out over the few workers elsewhere.
    elsewhere = [candidate for candidate in ring if host[candidate] != host[worker]]
    if elsewhere:
        return elsewhere[place % len(elsewhere)]
    return other if other != worker else None


def _check_stages(layers: int, stages: Sequence[tuple[range, Sequence[int]]]) -> None:
    covered = [layer for run, _ in stages for layer in run]
    if covered != list(range(layers)):
        raise LayoutError(f"the stages hold layers {covered} instead of 0 to {layers - 1}, each once and in order")
    workers = [worker for _, members in stages for worker in members]
    if len(set(workers)) < len(workers):
        raise LayoutError(f"a worker is a member twice: {workers}")
    for number, (run, members) in enumerate(stages):
        if not run or not members:
            raise LayoutError(f"stage {number} has {len(run)} layers and {len(members)} members; it needs at least one of each")


def _cut(model: ModelSpec, layer: int, totals: dict[int, int], replicas: Mapping[int, int | None]) -> tuple[Interval, ...]:
    """The intervals of one layer, in the order of the members; adds what each member got to `totals` (elements)."""
    size = model.layers[layer].size
    points = model.cut_points(layer)
    everything = sum(totals.values()) + size
    intervals: list[Interval] = []
    start = before = 0
    for place, owner in enumerate(totals, 1):
        # The ideal end makes up for what rounding gave to this member and those before it in the layers done so far.
        before += totals[owner]
        ideal = everything * place / len(totals) - before
        stop = max(start, _nearest(points, size, ideal)) if place < len(totals) else size
        if start < stop:
            intervals.append(Interval(start=start, stop=stop, owner=owner, replica=replicas[owner]))
        totals[owner] += stop - start
        start = stop
    return tuple(intervals)


def _nearest(points: Sequence[int], size: int, position: float) -> int:
    """The one of `points` (ascending) and `size` that is nearest to `position`, the lower one of two."""
    above = bisect_left(points, position)
    return min([*points[max(above - 1, 0) : above + 1], size], key=lambda point: abs(point - position))
