"""The layout: which workers own, replicate and gather each run of each layer; and `spread`, which makes a layout from a list of stages.

ZeRO is interleaved: every layer is spread over all members of its stage. A layer that moves to another stage, or a member that
leaves, therefore becomes transfers between many disjoint pairs of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.errors import LayoutError
from elastic.layout.ownership import OwnedRun, cut, keep
from elastic.layout.regions import ModelSpec
from elastic.layout.replicas import Holders, Spots, keep_replicas, replica_holders
from elastic.layout.runs import Run

__all__ = ["Interval", "LayerLayout", "Layout", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """The run `[start, stop)` (elements) of a layer's vector, its owner (the worker that updates it), and the workers that keep a copy."""

    start: int
    stop: int
    owner: int
    replicas: Holders = ()

    @property
    def run(self) -> Run:
        """The run as a pair."""
        return self.start, self.stop

    @property
    def elements(self) -> int:
        """Length of the run."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """One layer: the members of its stage, each of which holds all its parameters, and its intervals in ascending order."""

    layer: int
    members: tuple[int, ...]
    intervals: tuple[Interval, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layouts of all layers. The constructor checks nothing: `elastic.layout.invariants.check` does."""

    model: ModelSpec
    layers: tuple[LayerLayout, ...]

    @property
    def workers(self) -> tuple[int, ...]:
        """All workers, in the order of their stages."""
        return tuple(dict.fromkeys(worker for layer in self.layers for worker in layer.members))

    def owned(self, worker: int) -> list[tuple[int, Interval]]:
        """The `(layer, interval)` pairs that `worker` owns, ascending."""
        return [(layer.layer, interval) for layer in self.layers for interval in layer.intervals if interval.owner == worker]

    def members(self, layer: int) -> tuple[int, ...]:
        """The workers of the layer's stage. Each holds all the layer's parameters."""
        return self.layers[layer].members

    def layers_of(self, worker: int) -> tuple[int, ...]:
        """The layers of the worker's stage, ascending."""
        return tuple(layer.layer for layer in self.layers if worker in layer.members)

    def to_json(self) -> dict[str, Any]:
        """Writes each distinct member list once; intervals are flat `gap, length, owner, replicas`, with the gap to the interval before.

        The replicas are None, one worker, or a list of several.
        """
        groups: dict[tuple[int, ...], int] = {}
        layers: list[list[Any]] = []
        for layer in self.layers:
            flat: list[int | list[int] | None] = []
            position = 0
            for interval in layer.intervals:
                flat += (interval.start - position, interval.elements, interval.owner, _written(interval.replicas))
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
    for gap, length, owner, replicas in zip(flat[0::4], flat[1::4], flat[2::4], flat[3::4], strict=True):
        start, position = position + gap, position + gap + length
        intervals.append(Interval(start=start, stop=position, owner=owner, replicas=_read(replicas)))
    return tuple(intervals)


def _written(replicas: Holders) -> int | list[int] | None:
    return None if not replicas else replicas[0] if len(replicas) == 1 else list(replicas)


def _read(replicas: int | list[int] | None) -> Holders:
    return () if replicas is None else (replicas,) if isinstance(replicas, int) else tuple(replicas)


def spread(
    model: ModelSpec,
    stages: Sequence[tuple[range, Sequence[int]]],
    places: Mapping[int, str] | None = None,
    near: Layout | None = None,
    *,
    outlive: bool = False,
    copies: int = 2,
    hosts: Mapping[int, str] | None = None,
) -> Layout:
    """Cuts every layer into near-equal contiguous intervals, one for each member of its stage.

    A member that rounding to cut points gave too much in one layer gets less in the next: with block cuts, totals differ by at most a
    block or two. Each run has `copies` in all, as far as there are hosts: its replicas go to workers on other hosts, and in other racks as
    long as there are any. `places` maps workers to racks, or to hosts where racks say nothing; `hosts` maps them to hosts if `places` are
    racks. If all workers share a host, replicas go to other workers, or there are none if state outlives its process (`outlive`).
    With `near`, the layout before a loss or a join, intervals keep their owner and replicas as far as balance allows; a member may then
    have several in one layer. Raises LayoutError unless the stages are non-empty, have disjoint workers and cover the layers in order, or
    if `near` is of another model.
    """
    _check_stages(model.depth, stages)
    spots = Spots([worker for _, members in stages for worker in members], places, hosts, copies, outlive)
    if near is not None:
        return _kept(model, stages, spots, near)
    replicas = replica_holders(spots)
    layers: list[LayerLayout] = []
    for run, members in _runs(model, stages):
        totals = dict.fromkeys(members, 0)
        for layer in run:
            owned = cut(model, layer, totals)
            intervals = tuple(Interval(start=start, stop=stop, owner=owner, replicas=replicas[owner]) for start, stop, owner in owned)
            layers.append(LayerLayout(layer=layer, members=tuple(members), intervals=intervals))
    return Layout(model=model, layers=tuple(sorted(layers, key=lambda layer: layer.layer)))


def _runs(model: ModelSpec, stages: Sequence[tuple[range, Sequence[int]]]) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Returns the vectors that are divided evenly among the same members: of each stage, those that are trained, and those that are not."""
    found: list[tuple[Sequence[int], Sequence[int]]] = []
    for run, members in stages:
        parts = [part for layer in run for part in model.parts[layer]]
        kinds = ([part for part in parts if part not in model.frozen], [part for part in parts if part in model.frozen])
        found += [(sorted(kind), members) for kind in kinds if kind]
    return found


def _kept(model: ModelSpec, stages: Sequence[tuple[range, Sequence[int]]], spots: Spots, near: Layout) -> Layout:
    if near.model != model:
        raise LayoutError("the earlier layout is of another model")
    if _unchanged(stages, spots, near):
        return near
    before = {
        layer.layer: [OwnedRun(start=i.start, stop=i.stop, owner=i.owner, had=(i.owner, *i.replicas)) for i in layer.intervals]
        for layer in near.layers
    }
    owned: dict[int, tuple[Sequence[int], list[OwnedRun]]] = {}
    for run, members in _runs(model, stages):
        there = [layer for layer in near.layers_of(members[0]) if (layer in model.frozen) == (run[0] in model.frozen)]
        settled = there == list(run) and all(set(near.members(layer)) == set(members) for layer in run)
        kept = before if settled else keep(model, run, members, before)
        owned |= {layer: (members, kept[layer]) for layer in run}
    ordered = [owned[layer] for layer in sorted(owned)]
    layers = [
        LayerLayout(
            layer=number,
            members=tuple(members),
            intervals=tuple(Interval(start=p.start, stop=p.stop, owner=p.owner, replicas=replicas) for p, replicas in found),
        )
        for number, ((members, _), found) in enumerate(zip(ordered, keep_replicas(ordered, spots), strict=True))
    ]
    return Layout(model=model, layers=tuple(layers))


def _unchanged(stages: Sequence[tuple[range, Sequence[int]]], spots: Spots, near: Layout) -> bool:
    wanted = {part: tuple(members) for run, members in stages for layer in run for part in near.model.parts[layer]}
    same = all(layer.members == wanted[layer.layer] for layer in near.layers)
    return same and all(spots.suit(interval.owner, interval.replicas) for layer in near.layers for interval in layer.intervals)


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
