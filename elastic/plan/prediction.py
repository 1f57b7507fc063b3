"""What a step of a plan is predicted to take; and the interface of the cost models that say so, for a job and for a cluster."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic.plan.plan import Stage
from elastic.plan.slicing import finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds of a step: of its micro-batches with their messages, of the longest exchange of gradients and of the longest update.

    `stage_s` is by stage, as the cost model counts: see there. `crowded_s` is the least that hosts need which cannot compute for all their
    workers at the same time, 0 without such a host. `stage_bytes` are those of the member of each stage that needs most, and `fits` whether
    all members have that memory; a model that checks memory by itself leaves them out.
    """

    compute_s: float
    exchange_s: float
    stage_s: tuple[float, ...]
    update_s: float = 0.0
    crowded_s: float = 0.0
    stage_bytes: tuple[float, ...] = ()
    fits: bool = True

    @property
    def apart_s(self) -> float:
        """Of a step, if every worker computes on something of its own."""
        return self.compute_s + self.update_s + self.exchange_s

    @property
    def step_s(self) -> float:
        """Of a step, where it is computed."""
        return max(self.compute_s, self.crowded_s) + self.update_s + self.exchange_s

    @property
    def bottleneck(self) -> int:
        """The stage that takes longest, the first of equals."""
        return max(range(len(self.stage_s)), key=lambda number: self.stage_s[number])


class CostModel(Protocol):
    """Predicts plans from what is known of members, layers and links: `JobCosts` of a running job, `ClusterCosts` of a cluster."""

    def predicting(self, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> Generator[None, None, Prediction]:
        """Yields every few milliseconds, where the caller may do something else."""
        ...


def predict(costs: CostModel, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> Prediction:
    """The prediction, in one go."""
    return finish(costs.predicting(stages, routes))
