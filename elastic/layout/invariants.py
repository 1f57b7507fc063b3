"""Checks layouts. Each invariant has a name, which starts the message of the error that reports its violation.

order        layers 0, 1, ... in order; the layers of a stage are neighbours, and no worker is in two stages
members      every layer has members, none twice
coverage     the intervals of a layer cover every element and stay inside the layer
single owner no element is in two intervals, and intervals are not empty
ownership    owners are members of the layer's stage
alignment    intervals start at allowed cut points
replication  replicas are with different other workers of the layout, and are missing only when there is one worker
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NoReturn

from elastic.errors import LayoutError
from elastic.layout.layout import Interval, LayerLayout, Layout
from elastic.layout.regions import ModelSpec


def check(layout: Layout, *, replicated: bool = True) -> None:
    """Raises LayoutError, naming the invariant, the layer and the run, unless every invariant holds.

    `replicated`: each run needs a replica if there are two workers.
    """
    _check_order(layout.layers, layout.model)
    workers = set(layout.workers)
    for layer in layout.layers:
        _check_coverage(layer, layout.model.layers[layer.layer].size)
        _check_alignment(layer, layout.model)
        for interval in layer.intervals:
            _check_holders(layer, interval, workers, replicated=replicated)


def _refuse(invariant: str, layer: int, run: tuple[int, int] | None, why: str) -> NoReturn:
    where = f"layer {layer}" if run is None else f"layer {layer}, run [{run[0]}, {run[1]})"
    raise LayoutError(f"{invariant}: {where}: {why}")


def _check_order(layers: Sequence[LayerLayout], model: ModelSpec) -> None:
    expected = len(model.layers)
    for position, layer in enumerate(layers):
        if layer.layer != position:
            _refuse("order", layer.layer, None, f"found where layer {position} should be")
        if not layer.members or len(set(layer.members)) < len(layer.members):
            _refuse("members", position, None, f"members are {layer.members}")
    if len(layers) != expected:
        _refuse("order", len(layers), None, f"the layout has {len(layers)} layers and the model {expected}")
    for part in layers[model.depth :]:
        if part.members != layers[model.layers[part.layer].module].members:
            _refuse("members", part.layer, None, f"its members are {part.members}, and not those of the layer that it is a part of")
    ended: set[int] = set()
    for before, after in pairwise(layers[: model.depth]):
        if before.members == after.members:
            continue
        ended.update(before.members)
        if ended.intersection(after.members):
            _refuse("order", after.layer, None, f"workers {sorted(ended.intersection(after.members))} are members of an earlier stage too")


def _check_coverage(layer: LayerLayout, size: int) -> None:
    position = 0
    for interval in layer.intervals:
        if interval.start >= interval.stop:
            _refuse("single owner", layer.layer, (interval.start, interval.stop), "the interval is empty")
        if interval.start < position:
            _refuse("single owner", layer.layer, (interval.start, min(position, interval.stop)), "in two intervals, or out of order")
        if interval.start > position:
            _refuse("coverage", layer.layer, (position, interval.start), "no worker owns it")
        position = interval.stop
    if position < size:
        _refuse("coverage", layer.layer, (position, size), "no worker owns it")
    if position > size:
        _refuse("coverage", layer.layer, (size, position), f"it is owned and lies outside of the layer, which has {size} elements")


def _check_alignment(layer: LayerLayout, model: ModelSpec) -> None:
    points = model.cut_points(layer.layer)
    allowed: Collection[int] = points if isinstance(points, range) else set(points)
    for interval in layer.intervals:
        if interval.start not in allowed:
            _refuse("alignment", layer.layer, (interval.start, interval.stop), f"its start is not at an allowed {model.cut} cut")


def _check_holders(layer: LayerLayout, interval: Interval, workers: Collection[int], *, replicated: bool) -> None:
    run = (interval.start, interval.stop)
    if interval.owner not in layer.members:
        _refuse("ownership", layer.layer, run, f"its owner {interval.owner} is not one of the members {layer.members}")
    if not interval.replicas and replicated and len(workers) > 1:
        _refuse("replication", layer.layer, run, f"it has no replica, and there are {len(workers)} workers")
    if interval.owner in interval.replicas:
        _refuse("replication", layer.layer, run, f"worker {interval.owner} is both its owner and its replica")
    if len(set(interval.replicas)) < len(interval.replicas):
        _refuse("replication", layer.layer, run, f"a worker keeps it twice: its replicas are {interval.replicas}")
    for worker in interval.replicas:
        if worker not in workers:
            _refuse("replication", layer.layer, run, f"its replica {worker} is not a worker of this layout")
