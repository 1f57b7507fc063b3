"""ZeRO-1: the user's optimizer instance over the pieces of parameters that this worker owns.

The instance stays the user's own, so schedulers bound to it go on working; only the tensors in its groups are exchanged for
views of the owned runs. A probe at the start (`engine/probe.py`) tells whether that changes bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from elastic.engine.after_step import AfterStep
from elastic.engine.model import LayeredModel
from elastic.engine.probe import Probed, probe, second
from elastic.engine.reducer import OwnedGradient
from elastic.engine.reduction import Parts
from elastic.engine.shard import RUN, GradientScale, Scalars, Shard, Updater, copied, unscaled
from elastic.errors import TrainerError
from elastic.layout.layout import Interval
from elastic.layout.regions import MASTER, PARAM
from elastic.memory.tensors import lasting, lasting_copy


class ShardedOptimizer:
    """The user's optimizer over this worker's own shards, and a second instance of it over the shards it keeps for others.

    The second one *replays* what owners did: the same update of the same shard, with the same gradient and settings, has the same bits.
    """

    def __init__(self, optimizer: Optimizer, model: LayeredModel, probed: Probed | None = None) -> None:
        self.optimizer = optimizer
        self.after: list[AfterStep] = []
        self._model = model
        self._group_of: dict[str, int] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = model.name_of(parameter)
                if name is None:
                    raise TrainerError(f"parameter group {number} of the optimizer holds a tensor that is not a parameter of the model")
                self._group_of[name] = number
        self._initial = {name: state for parameter, state in optimizer.state.items() if (name := model.name_of(parameter)) is not None}
        self.probed = probed or probe(optimizer, masters=model.spec.masters)
        self.owned, self.kept = self._updater(optimizer), self._updater(second(optimizer))

    def _updater(self, optimizer: Optimizer) -> Updater:
        devices = {name: value.device for name, value in self.probed.scalars.items() if isinstance(value, torch.Tensor)}
        return Updater(
            optimizer, self._model.spec, self._group_of, writes_gradients=self.probed.writes_gradients, after=self.after, devices=devices
        )

    def initial(self, layer: int, interval: Interval, run: torch.Tensor) -> Shard:
        """The shard of an interval before the first step: its parameters are in `run`, or will be when `raise_masters` is called again."""
        shard = Shard(layer=layer, interval=interval, memory={PARAM: run})
        if self._model.spec.has_masters(layer):
            shard.memory[MASTER] = lasting(interval.elements, self._model.dtype(layer, MASTER))
            shard.raise_masters()
        for parameter, start, stop in shard.parameters(self._model.spec):
            if MASTER in shard.memory and parameter.name in self._group_of:
                shard.scalars.setdefault(parameter.name, {})[MASTER] = RUN
            for name, value in self._initial.get(parameter.name, {}).items():
                scalars = shard.scalars.setdefault(parameter.name, {})
                if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or (name == "step" and not value.ndim):
                    if isinstance(value, torch.Tensor) and value.numel() > 1 and self._model.spec.cut == "block":
                        raise TrainerError(
                            f"the optimizer's state of {parameter.name} has shape {tuple(value.shape)}, the parameter {parameter.shape}: "
                            "cannot cut it"
                        )
                    scalars[name] = copied(value)
                    continue
                dtype = shard.worked.dtype if value.dtype == run.dtype else value.dtype
                memory = shard.memory.setdefault(name, lasting(interval.elements, dtype))
                offset = interval.start - parameter.start
                memory[start:stop] = value.detach().reshape(-1)[start + offset : stop + offset]
                scalars[name] = RUN
        return shard

    def step(self, gradients: Sequence[OwnedGradient], scale: GradientScale) -> None:
        """Updates the owned shards; a parameter without gradient is skipped.

        Scales the gradient sums in place, except those of parameters with masters: these are scaled in float32, here and where replicas
        are updated, since they may be too small for their own dtype.
        """
        for gradient in gradients:
            if not self._model.spec.has_masters(gradient.layer):
                scale(gradient.memory)
        self.owned.step({(gradient.layer, gradient.interval.start): gradient.parts for gradient in gradients}, scale)

    def names(self) -> list[tuple[str, ...]]:
        """The parameters of each group, in the order of the model."""
        return [
            tuple(name for name, group in self._group_of.items() if group == number) for number in range(len(self.optimizer.param_groups))
        ]

    def settings(self) -> list[dict[str, Any]]:
        """Every group's settings, such as its learning rate: copies."""
        return [{name: copied(value) for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]

    def replay(
        self,
        gradients: Mapping[tuple[int, int], Parts],
        settings: Sequence[Mapping[str, Any]],
        scale: GradientScale = unscaled,
        *,
        skipped: bool = False,
    ) -> None:
        """Updates shards kept for others as their owner did, with the groups' settings and the `scale` of that step."""
        for group, values in zip(self.kept.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.kept.step(gradients, scale, skipped=skipped)

    def replayed(
        self,
        shard: Shard,
        scalars: Scalars,
        parts: Parts,
        settings: Sequence[Mapping[str, Any]],
        scale: GradientScale = unscaled,
        *,
        skipped: bool = False,
    ) -> Shard:
        """A copy of a shard kept for another worker, one update later."""
        later = Shard(
            layer=shard.layer,
            interval=shard.interval,
            memory={name: lasting_copy(memory) for name, memory in shard.memory.items()},
            scalars=scalars,
        )
        updater = self._updater(second(self.optimizer))
        for group, values in zip(updater.optimizer.param_groups, settings, strict=True):
            group.update(values)
        updater.bind([later])
        updater.step({(later.layer, later.interval.start): parts}, scale, skipped=skipped)
        later.scalars = updater.scalars(later)
        return later

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state and masters of what is owned here."""
        states = [*self.optimizer.state.values(), *({MASTER: s.memory[MASTER]} for s in self.owned.shards.values() if MASTER in s.memory)]
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))


def scaling(denominator: float, clip: float) -> GradientScale:
    """Divides once by the sum of weights, times the loss scale; multiplies by the clip factor where it is below 1."""

    def scale(gradient: torch.Tensor) -> None:
        if denominator != 1.0:
            gradient.div_(denominator)
        if clip < 1.0:
            gradient.mul_(clip)

    return scale
