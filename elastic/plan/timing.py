"""The durations in a step: per worker its actions and its update, per boundary the messages, per stage its synchronisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from elastic.errors import PlanError
from elastic.plan.plan import Stage
from elastic.plan.workload import LayerCost, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSeconds:
    """Seconds that one worker takes for a micro-batch's forward, its backward, and for the update.

    A backward in two parts takes `input_s` and `weight_s`; both are 0 if it cannot be split.
    """

    forward_s: float
    backward_s: float
    update_s: float = 0.0
    input_s: float = 0.0
    weight_s: float = 0.0

    def __post_init__(self) -> None:
        for name in _MEMBER_SECONDS:
            _check_seconds(getattr(self, name), f"{name} of a worker")

    def slowed(self, factor: float) -> MemberSeconds:
        """Returns the seconds with everything `factor` times as long."""
        if factor == 1.0:
            return self
        return MemberSeconds(**{name: getattr(self, name) * factor for name in _MEMBER_SECONDS})


_MEMBER_SECONDS = tuple(each.name for each in fields(MemberSeconds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """Seconds that a message occupies the link between two workers, by boundary: activations go up, gradients down.

    `stage` maps workers to stages; index s of the others is the boundary between stages s and s + 1.
    """

    stage: Mapping[int, int]
    activations_s: tuple[float, ...]
    gradients_s: tuple[float, ...]

    def __post_init__(self) -> None:
        for seconds in (*self.activations_s, *self.gradients_s):
            _check_seconds(seconds, "a message over a boundary")

    def __call__(self, sender: int, receiver: int) -> float:
        start, stop = self.stage[sender], self.stage[receiver]
        return self.activations_s[start] if stop > start else self.gradients_s[stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The workers of each stage, the pace of each worker, seconds of each stage's synchronisation, and the links (None: they take no time).

    Raises PlanError on seconds that are negative or not finite, and on members without a pace.
    """

    members: tuple[tuple[int, ...], ...]
    paces: Mapping[int, MemberSeconds]
    sync_s: tuple[float, ...]
    links: Boundaries | None = None
    stage: Mapping[int, int] = field(init=False, repr=False)
    """The stage of each worker."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage", {worker: number for number, group in enumerate(self.members) for worker in group})
        if lacking := [worker for worker in self.stage if worker not in self.paces]:
            raise PlanError(f"workers {lacking} have no pace: measure them, or derive it from their device's")
        if len(self.sync_s) != len(self.members):
            raise PlanError(f"{len(self.members)} stages have seconds of synchronisation for {len(self.sync_s)}")
        for seconds in self.sync_s:
            _check_seconds(seconds, "the synchronisation of a stage")

    @classmethod
    def of(cls, workload: Workload, stages: Sequence[Stage]) -> Timing:
        """Uses the workload's own seconds for every worker; updates, links and synchronisation take no time."""
        paces: dict[int, MemberSeconds] = {}
        for stage in stages:
            layers = [workload.layers[layer] for layer in stage.layers]
            paces |= dict.fromkeys(stage.members, _pace(layers))
        return cls(members=tuple(stage.members for stage in stages), paces=paces, sync_s=(0.0,) * len(stages))

    def slowed(self, factors: Mapping[int, float]) -> Timing:
        """Makes the actions of each worker `factors[worker]` times as long; workers not listed keep their pace."""
        return replace(self, paces={worker: pace.slowed(factors.get(worker, 1.0)) for worker, pace in self.paces.items()})

    def linked(self, activations_s: Sequence[float], gradients_s: Sequence[float]) -> Timing:
        """Sets the seconds per boundary: index s is between the stages s and s + 1."""
        if not len(activations_s) == len(gradients_s) == len(self.members) - 1:
            raise PlanError(
                f"{len(self.members)} stages have {len(self.members) - 1} boundaries, not {len(activations_s)} and {len(gradients_s)}"
            )
        boundaries = Boundaries(stage=self.stage, activations_s=tuple(activations_s), gradients_s=tuple(gradients_s))
        return replace(self, links=boundaries)


def _pace(layers: Sequence[LayerCost]) -> MemberSeconds:
    """Returns the sum of the layers. A layer whose backward cannot be split computes all of it in the first part."""
    weight_s = sum(layer.weight_s for layer in layers)
    return MemberSeconds(
        forward_s=sum(layer.forward_s for layer in layers),
        backward_s=sum(layer.backward_s for layer in layers),
        input_s=sum(layer.input_s if layer.weight_s else layer.backward_s for layer in layers) if weight_s else 0.0,
        weight_s=weight_s,
    )


def _check_seconds(seconds: float, what: str) -> None:
    if not (math.isfinite(seconds) and seconds >= 0):
        raise PlanError(f"{what} takes {seconds} s; that must be finite and not negative: measure it again")
