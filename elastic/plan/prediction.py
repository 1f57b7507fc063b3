"""The prediction of a plan's step, and the interface of the cost models (of a job, of a cluster) that make it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic.plan.plan import Stage
from elastic.plan.slicing import finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted seconds of a step: its micro-batches with their messages, the longest exchange of gradients and the longest update.

    `stage_s` is per stage; each cost model defines what it counts. `crowded_s` is the least time that hosts need which cannot compute for
    all their workers at once, 0 without such a host. `stage_bytes` are those of each stage's member that needs most; `fits` is whether all
    members have that memory. A cost model whose memory is checked elsewhere leaves out both. `dealt`: the seconds are those of
    micro-batches that are dealt out (`elastic.plan.dealing`), since that is faster and fits.
    """

    compute_s: float
    exchange_s: float
    stage_s: tuple[float, ...]
    update_s: float = 0.0
    crowded_s: float = 0.0
    stage_bytes: tuple[float, ...] = ()
    fits: bool = True
    dealt: bool = False

    @property
    def apart_s(self) -> float:
        """Seconds of a step if no worker shares its processors with others."""
        return self.compute_s + self.update_s + self.exchange_s

    @property
    def step_s(self) -> float:
        """Seconds of a step on the actual hosts."""
        return max(self.compute_s, self.crowded_s) + self.update_s + self.exchange_s

    @property
    def bottleneck(self) -> int:
        """The stage that takes longest; the first of equals."""
        return max(range(len(self.stage_s)), key=lambda number: self.stage_s[number])


class CostModel(Protocol):
    """Predicts plans from data on members, layers and links: `JobCosts` for a running job, `ClusterCosts` for a cluster."""

    def predicting(self, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> Generator[None, None, Prediction]:
        """Returns the prediction; yields every few milliseconds, so that the caller can do something else."""
        ...


def predict(costs: CostModel, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> Prediction:
    """Returns the prediction without yielding."""
    return finish(costs.predicting(stages, routes))
