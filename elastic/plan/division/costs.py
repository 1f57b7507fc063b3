"""Predicts a division, and a plan on a cluster, with a cost model's rules: step time, and memory of each stage."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from elastic.plan.division.compile import crossing
from elastic.plan.division.division import Section
from elastic.plan.division.rules import PoolCosts, pipeline_seconds
from elastic.plan.division.shapes import Shape, together
from elastic.plan.plan import Stage
from elastic.plan.prediction import Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterCosts:
    """The cost model of plans on a cluster: `rules` for micro-batches of `micro_batch` samples, `micro_batches` of them per pipeline.

    `pools` maps each member to its pool. `stage_s` of its predictions is the time of a stage for one micro-batch, with its transfers.
    """

    rules: PoolCosts
    micro_batch: int
    micro_batches: int
    pools: Mapping[int, int]

    def predicting(self, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> Generator[None, None, Prediction]:
        yield
        sections: list[Section] = []
        for stage in stages:
            groups = stage.groups or tuple((member,) for member in stage.members)
            makeup = together(Shape(self.pools[group[0]], len(group)) for group in groups)
            sections.append(Section(layers=stage.layers, makeup=makeup))
        return costs(self.rules, sections, self.micro_batch, self.micro_batches)


def costs(rules: PoolCosts, stages: Sequence[Section], size: int, micro_batches: int) -> Prediction:
    """Predicts the step of a 1F1B pipeline: the seconds of the pipeline, plus the slowest update and synchronisation.

    A stage has as many micro-batches in flight as there are stages from it to the end, but at most all.
    """
    stage_s = tuple(_stage_s(rules, stages, number, size) for number in range(len(stages)))
    in_flight = [min(len(stages) - number, micro_batches) for number in range(len(stages))]
    needs = [_need(rules, stage, size, count) for stage, count in zip(stages, in_flight, strict=True)]
    return Prediction(
        compute_s=pipeline_seconds(stage_s, micro_batches),
        exchange_s=max(float(rules.sync_s(s.makeup)[s.layers.start, s.layers.stop]) for s in stages),
        update_s=max(float(rules.update_s(shape, size)[s.layers.start, s.layers.stop]) for s in stages for shape in s.makeup.shapes),
        stage_s=stage_s,
        stage_bytes=tuple(need for need, _ in needs),
        fits=all(room >= 0 for _, room in needs),
    )


def _stage_s(rules: PoolCosts, stages: Sequence[Section], number: int, size: int) -> float:
    stage, depth = stages[number], len(stages)
    layers, makeup = stage.layers, stage.makeup
    computing = max(float(rules.seconds(shape, size)[layers.start : layers.stop].sum()) for shape in makeup.shapes)
    onward = back = 0.0
    if number + 1 < depth:
        onward = float(crossing(rules.forward_s, makeup, stages[number + 1].makeup, size)[layers.stop])
    if number:
        back = float(crossing(rules.backward_s, makeup, stages[number - 1].makeup, size)[layers.start])
    return computing + rules.transfers.seconds(number, depth, onward, back)


def _need(rules: PoolCosts, stage: Section, size: int, in_flight: int) -> tuple[float, float]:
    """Returns the most bytes on a device, and the least bytes left free on one."""
    layers, shared = stage.layers, stage.makeup.replicas > 1
    feet = [rules.footprint(shape, size, shared) for shape in stage.makeup.shapes]
    needs = [float(foot.fixed[layers.start, layers.stop] + in_flight * foot.in_flight[layers.start, layers.stop]) for foot in feet]
    return max(needs), float(np.min([foot.capacity - need for foot, need in zip(feet, needs, strict=True)]))
