"""A division: layers per stage, and each stage's replicas by device kind and tensor-parallel degree, before devices are chosen. A value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.errors import PlanError
from elastic.plan.division.shapes import Makeup, Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A contiguous run of layers and the replicas that serve it."""

    layers: range
    makeup: Makeup


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Stages in order; samples per micro-batch; micro-batches per replica and step; predicted seconds of a step; whether it is proven best.

    Raises PlanError unless the stages hold layers 0, 1, ... in order, with equally many replicas.
    """

    micro_batch: int
    micro_batches: int
    stages: tuple[Section, ...]
    step_s: float
    exact: bool

    def __post_init__(self) -> None:
        start = 0
        for number, stage in enumerate(self.stages):
            if stage.layers.start != start or not stage.layers or stage.layers.step != 1:
                raise PlanError(f"stage {number} has layers {stage.layers}; layer {start} comes next")
            start = stage.layers.stop
        if len({stage.makeup.replicas for stage in self.stages}) != 1:
            raise PlanError(f"all stages need equally many replicas, not {[stage.makeup.replicas for stage in self.stages]}")

    @property
    def replicas(self) -> int:
        """How many replicas each stage has."""
        return self.stages[0].makeup.replicas

    def summary(self, pools: Sequence[Pool]) -> str:
        """Layers, replicas, kind and degree per stage, such as `mbs 2, 32 micro-batches: [0-8] 16xV100-16/4 | [9-25] 16xA100-40/2`."""
        stages = (
            f"[{stage.layers.start}-{stage.layers.stop - 1}] "
            + "+".join(f"{count}x{pools[shape.pool].kind}/{shape.tp}" for shape, count in stage.makeup.parts)
            for stage in self.stages
        )
        return f"mbs {self.micro_batch}, {self.micro_batches} micro-batches: {' | '.join(stages)}"
