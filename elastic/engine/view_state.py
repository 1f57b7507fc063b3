"""What a worker begins a view with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.engine.executor import Enter
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.shard import Shard
from elastic.engine.stage import Loss
from elastic.engine.zero import ShardedOptimizer
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What an engine needs that no view changes. `skips`: a step that is not finite, or weighs nothing, is passed over."""

    numerics: Numerics
    loss: Loss
    clip_norms: tuple[float | None, ...]  # of steps in turn
    enter: Enter
    skips: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewState:
    """What a worker begins a view with: its shards, and those that it keeps for others, at step `step` (-1 before the first)."""

    step: int
    owned: Sequence[Shard]
    kept: Sequence[Shard]


def initial_state(worker: int, model: LayeredModel, optimizer: ShardedOptimizer, view: View) -> ViewState:
    """Of the first view, from the model that every worker built; afterwards it holds the worker's own layers only."""
    intervals = [(layer.layer, interval) for layer in view.layout.layers for interval in layer.intervals]
    kept = [
        optimizer.initial(layer, interval, model.values(layer, interval.start, interval.stop))
        for layer, interval in intervals
        if worker in interval.replicas
    ]
    model.hold(view.layout.layers_of(worker))
    if model.initial is not None:
        model.initial.close()
    owned = [
        optimizer.initial(layer, interval, model.run(layer, interval.start, interval.stop)) for layer, interval in view.layout.owned(worker)
    ]
    return ViewState(step=-1, owned=owned, kept=kept)
