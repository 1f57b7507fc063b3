"""Strategies for workloads and plans, and a replay of schedules that does not use the code that makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from elastic.plan.fleet import Fleet
from elastic.plan.plan import Stage
from elastic.plan.routing import even_routes
from elastic.plan.workload import LayerCost, Workload

few = settings(max_examples=100, deadline=None)

# Eighths of a second are exact, so sums of them can be compared for equality.
eighths = st.integers(0, 40).map(lambda eighth: eighth / 8)
coarse = st.sampled_from([0.0, 0.125, 0.25])
positive_eighths = st.integers(1, 40).map(lambda eighth: eighth / 8)

Planned = tuple[Workload, tuple[Stage, ...], tuple[tuple[int, ...], ...]]


def fleet(workers: Iterable[int], slowdowns: Mapping[int, float] | None = None, **more: Any) -> Fleet:
    return Fleet(workers=tuple(workers), slowdowns=slowdowns or {}, **more)


def cost(forward_s: float, backward_s: float, parameters: int = 0, **more: float) -> LayerCost:
    return LayerCost(forward_s=forward_s, backward_s=backward_s, parameters=parameters, activation_bytes=0, **more)


def splitting(workload: Workload, shares: Sequence[int]) -> Workload:
    """The same workload with backwards that can be split: layer i's second part takes `shares[i]` quarters of it, and no longer in all."""
    layers = [
        replace(layer, input_s=layer.backward_s * (4 - share) / 4, weight_s=layer.backward_s * share / 4)
        for layer, share in zip(workload.layers, shares, strict=False)
    ]
    return replace(workload, layers=tuple(layers))


@st.composite
def workloads(draw, most_layers: int = 6, seconds=eighths) -> Workload:
    costs = st.builds(cost, seconds, seconds, st.integers(0, 50).map(lambda hundred_million: hundred_million * 10**8))
    grains = draw(st.integers(1, 6))
    layers = draw(st.lists(costs, min_size=1, max_size=most_layers))
    return Workload(layers=tuple(layers), micro_batches=grains * draw(st.integers(1, 3)), grains=grains)


@st.composite
def planned(draw, seconds=eighths) -> Planned:
    """A workload, stages with any number of members, and their even routes."""
    workload = draw(workloads(seconds=seconds))
    layers = len(workload.layers)
    depth = draw(st.integers(1, min(layers, 4)))
    inner = sorted(draw(st.sets(st.integers(1, layers - 1), min_size=depth - 1, max_size=depth - 1))) if depth > 1 else []
    cuts = [0, *inner, layers]
    widths = draw(st.lists(st.integers(1, 4), min_size=depth, max_size=depth))
    firsts = [sum(widths[:i]) for i in range(depth)]
    stages = tuple(Stage(layers=range(cuts[i], cuts[i + 1]), members=tuple(range(firsts[i], firsts[i] + widths[i]))) for i in range(depth))
    return workload, stages, tuple(even_routes(workload.grains, stage.members) for stage in stages)


def step_seconds(lists: Mapping[int, Sequence[tuple[int, str, int]]], workload: Workload, stages: Sequence[Stage]) -> float:
    """The longest chain of actions, each waiting for the one before on its worker and for its micro-batch's one before."""
    before = {action: actions[i - 1] if i else None for actions in lists.values() for i, action in enumerate(actions)}
    depth = len(stages)

    @cache
    def end(action: tuple[int, str, int]) -> float:
        stage, kind, micro_batch = action
        layers = [workload.layers[layer] for layer in stages[stage].layers]
        if kind == "W":
            took, after = sum(layer.weight_s for layer in layers), (stage, "I", micro_batch)
        elif kind == "F":
            took, after = sum(layer.forward_s for layer in layers), (stage - 1, "F", micro_batch) if stage > 0 else None
        else:
            took = sum(layer.input_s if kind == "I" and layer.weight_s else layer.backward_s for layer in layers)
            above = next(each for each in "BI" if stage == depth - 1 or (stage + 1, each, micro_batch) in before)
            after = (stage + 1, above, micro_batch) if stage < depth - 1 else (stage, "F", micro_batch)
        return took + max((end(other) for other in (after, before[action]) if other is not None), default=0.0)

    return max(end(action) for action in before)
