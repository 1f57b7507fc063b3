"""How long everything in a step takes: per worker its actions and its update, per pair of workers the link, per stage its synchronisation.

The backward's split, where a profile does not give one, follows the floating-point operations of a transformer layer: Qi et al., "Zero
Bubble Pipeline Parallelism" (2023), table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from elastic.errors import PlanError
from elastic.plan.plan import Stage
from elastic.plan.workload import Workload

EVEN_SPLIT = 0.5
"""The weights' share of the backward of a product of matrices: as many operations as for the inputs."""

Links = Callable[[int, int], float]
"""Seconds that a message occupies the link from a worker to another: activations to the next stage, or gradients to the one before."""


def weights_share(hidden: int, sequence: int) -> float:
    """The weights' share of a transformer layer's backward.

    Of h (48 h + 8 s) operations per token, 24 h h are for weights; h is the hidden size, s the length of the sequence. Attention has none.
    """
    if hidden < 1 or sequence < 1:
        raise PlanError(f"a layer of hidden size {hidden} on sequences of {sequence} has no operations to split: both must be at least one")
    return 24 * hidden / (48 * hidden + 8 * sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds that one worker takes for a micro-batch's forward, its backward, the part of the backward for weights; and for the update."""

    forward_s: float
    backward_s: float
    weights_s: float = 0.0
    update_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s", "weights_s", "update_s"):
            _check_seconds(getattr(self, name), f"{name} of a worker")
        if self.weights_s > self.backward_s:
            raise PlanError(f"weights_s of a worker is {self.weights_s}, more than the whole backward, {self.backward_s}")

    @property
    def inputs_s(self) -> float:
        """Seconds of the backward's part for inputs."""
        return self.backward_s - self.weights_s

    def slowed(self, factor: float) -> Pace:
        """Everything takes `factor` times as long."""
        return Pace(
            forward_s=self.forward_s * factor,
            backward_s=self.backward_s * factor,
            weights_s=self.weights_s * factor,
            update_s=self.update_s * factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """Links that depend on the boundary between two stages only: seconds for activations up, and for gradients down."""

    stage: Mapping[int, int]
    activations_s: tuple[float, ...]
    gradients_s: tuple[float, ...]

    def __call__(self, sender: int, receiver: int) -> float:
        start, stop = self.stage[sender], self.stage[receiver]
        return self.activations_s[start] if stop > start else self.gradients_s[stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The workers of each stage, the pace of each worker, seconds of each stage's synchronisation, and the links (None: they take no time).

    With `barrier` updates begin only when all stages have synchronised. Raises PlanError on seconds that are negative or not finite, and
    on members without a pace.
    """

    members: tuple[tuple[int, ...], ...]
    paces: Mapping[int, Pace]
    sync_s: tuple[float, ...]
    links: Links | None = None
    barrier: bool = False
    stage: Mapping[int, int] = field(init=False, repr=False)
    """The stage of each worker."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage", {worker: number for number, group in enumerate(self.members) for worker in group})
        if lacking := [worker for worker in self.stage if worker not in self.paces]:
            raise PlanError(f"workers {lacking} have no pace: measure them, or derive theirs from their device's")
        if len(self.sync_s) != len(self.members):
            raise PlanError(f"{len(self.members)} stages have seconds of synchronisation for {len(self.sync_s)}")
        for seconds in self.sync_s:
            _check_seconds(seconds, "the synchronisation of a stage")

    @classmethod
    def of(cls, workload: Workload, stages: Sequence[Stage], weights_share: float = EVEN_SPLIT) -> Timing:
        """The workload's own seconds on every worker; updates, links and synchronisation take none.

        A layer's backward is `weights_share` for weights if the layer has any, else all for inputs.
        """
        if not 0 <= weights_share <= 1:
            raise PlanError(f"the weights' share of a backward is between 0 and 1, not {weights_share}")
        paces: dict[int, Pace] = {}
        for stage in stages:
            layers = [workload.layers[layer] for layer in stage.layers]
            backward_s = sum(layer.backward_s for layer in layers)
            weights_s = weights_share * sum(layer.backward_s for layer in layers if layer.parameters)
            pace = Pace(forward_s=sum(layer.forward_s for layer in layers), backward_s=backward_s, weights_s=min(weights_s, backward_s))
            paces |= dict.fromkeys(stage.members, pace)
        return cls(members=tuple(stage.members for stage in stages), paces=paces, sync_s=(0.0,) * len(stages))

    def slowed(self, workers: Mapping[int, float] | None = None, stages: Mapping[int, float] | None = None) -> Timing:
        """What the worker computes takes `workers[worker]` x `stages[its stage]` times as long; those not named keep their pace."""
        by_worker, by_stage = workers or {}, stages or {}
        factors = {worker: by_worker.get(worker, 1.0) * by_stage.get(number, 1.0) for worker, number in self.stage.items()}
        return replace(self, paces={worker: self.paces[worker].slowed(factor) for worker, factor in factors.items()})

    def updating(self, seconds: Mapping[int, float]) -> Timing:
        """With these seconds for the updates of these workers."""
        paces = {worker: replace(self.paces[worker], update_s=update_s) for worker, update_s in seconds.items()}
        return replace(self, paces={**self.paces, **paces})

    def linked(self, activations_s: Sequence[float], gradients_s: Sequence[float]) -> Timing:
        """With these seconds per boundary: place s is between the stages s and s + 1."""
        if not len(activations_s) == len(gradients_s) == len(self.members) - 1:
            raise PlanError(
                f"{len(self.members)} stages have {len(self.members) - 1} boundaries, not {len(activations_s)} and {len(gradients_s)}"
            )
        boundaries = Boundaries(stage=self.stage, activations_s=tuple(activations_s), gradients_s=tuple(gradients_s))
        return replace(self, links=boundaries)

    def link_s(self, sender: int, receiver: int) -> float:
        """Seconds of one message; raises PlanError if `links` gives what is negative or not finite."""
        if self.links is None:
            return 0.0
        seconds = self.links(sender, receiver)
        _check_seconds(seconds, f"the link from worker {sender} to {receiver}")
        return seconds


def _check_seconds(seconds: float, what: str) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise PlanError(f"{what} takes {seconds} s; that must be finite and not negative: measure it again")
