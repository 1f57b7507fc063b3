"""What a given plan costs under a cost model: step time, and memory of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from elastic.plan.hetero.compile import crossing
from elastic.plan.hetero.plan import HeteroStage
from elastic.plan.hetero.rules import Rules


class Prediction(NamedTuple):
    """Seconds of a step and its parts, and the peak bytes of a device of each stage."""

    step_s: float
    stage_s: tuple[float, ...]
    sync_s: float
    update_s: float
    stage_bytes: tuple[float, ...]
    fits: bool

    @property
    def peak_bytes(self) -> float:
        """Of the stage that needs most."""
        return max(self.stage_bytes)


def predict(rules: Rules, stages: Sequence[HeteroStage], size: int, micro_batches: int) -> Prediction:
    """The step of a 1F1B pipeline: `(M - 1) max + sum` over the stages, and the slowest update and synchronisation.

    A stage keeps as many micro-batches in flight as there are stages from it to the end, but no more than there are.
    """
    stage_s = tuple(_stage_s(rules, stages, number, size) for number in range(len(stages)))
    update_s = max(float(rules.update_s(shape, size)[s.layers.start, s.layers.stop]) for s in stages for shape in s.makeup.shapes)
    sync_s = max(float(rules.sync_s(s.makeup)[s.layers.start, s.layers.stop]) for s in stages)
    in_flight = [min(len(stages) - number, micro_batches) for number in range(len(stages))]
    needs = [_need(rules, stage, size, count) for stage, count in zip(stages, in_flight, strict=True)]
    return Prediction(
        step_s=(micro_batches - 1) * max(stage_s) + sum(stage_s) + update_s + sync_s,
        stage_s=stage_s,
        sync_s=sync_s,
        update_s=update_s,
        stage_bytes=tuple(need for need, _ in needs),
        fits=all(room >= 0 for _, room in needs),
    )


def _stage_s(rules: Rules, stages: Sequence[HeteroStage], number: int, size: int) -> float:
    stage, depth, charge = stages[number], len(stages), rules.transfers
    layers, makeup = stage.layers, stage.makeup
    computing = max(float(rules.seconds(shape, size)[layers.start : layers.stop].sum()) for shape in makeup.shapes)
    onward = back = 0.0
    if number + 1 < depth:
        onward = float(crossing(rules.forward_s, makeup, stages[number + 1].makeup, size)[layers.stop])
    if number:
        back = float(crossing(rules.backward_s, makeup, stages[number - 1].makeup, size)[layers.start])
    if number == depth - 1:
        return computing + charge.last * back
    return computing + (charge.middle * (onward + back) if number else charge.of_first(depth) * onward)


def _need(rules: Rules, stage: HeteroStage, size: int, in_flight: int) -> tuple[float, float]:
    """The most bytes on a device, and the least room that is left on one."""
    layers, shared = stage.layers, stage.makeup.replicas > 1
    feet = [rules.footprint(shape, size, shared) for shape in stage.makeup.shapes]
    needs = [float(foot.fixed[layers.start, layers.stop] + in_flight * foot.in_flight[layers.start, layers.stop]) for foot in feet]
    return max(needs), float(np.min([foot.capacity - need for foot, need in zip(feet, needs, strict=True)]))
