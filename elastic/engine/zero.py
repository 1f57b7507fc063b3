"""ZeRO-1: the user's optimizer instance over the pieces of parameters that this worker owns.

The instance stays the user's own, so schedulers bound to it go on working; only the tensors in its groups are exchanged for
views of the owned runs. A probe at the start tells whether that changes bits.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elastic.engine.model import LayeredModel
from elastic.engine.reducer import OwnedGradient
from elastic.engine.reduction import Parts
from elastic.engine.shard import RUN, Scalars, Shard, Updater, copied
from elastic.errors import TrainerError
from elastic.layout.layout import Interval
from elastic.layout.regions import BLOCK, Cut
from elastic.layout.transfer import PARAM


def _trial(optimizer: Optimizer, parameters: Sequence[torch.Tensor]) -> Optimizer:
    """A fresh optimizer of the same kind and first group's settings, over other tensors."""
    trial = _second(optimizer)
    for example, state in list(optimizer.state.items())[:1]:  # some, such as Adagrad, make state when they are made
        for parameter in parameters:
            trial.state[parameter] = {name: _like(value, example, parameter) for name, value in state.items()}
    trial.param_groups = [{**optimizer.param_groups[0], "params": list(parameters)}]
    return trial


def _like(value: Any, example: torch.Tensor, parameter: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == example.shape and value.numel() > 1:
        return torch.full_like(parameter, float(value.flatten()[0]), requires_grad=False)
    return value.clone()


def _after_steps(optimizer: Optimizer, whole: Sequence[torch.Tensor], gradients: Sequence[Sequence[torch.Tensor]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(whole, step, strict=True):
            parameter.grad = gradient
        optimizer.step()


def _steps(optimizer: Optimizer, dtype: torch.dtype, together: bool, cuts: Sequence[int]) -> list[torch.Tensor]:
    """Two tensors after three steps: in one optimizer or one each, whole (no cuts) or cut at the given elements."""
    generator = torch.Generator().manual_seed(20)
    shape = (3, BLOCK + 1024)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    gradients = [[torch.randn(shape, generator=generator).to(dtype) for _ in range(2)] for _ in range(3)]
    edges = [0, *cuts, tensors[0].numel()]

    def pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.view(-1)[a:b] for a, b in itertools.pairwise(edges)] if cuts else [tensor]

    lots = [[0, 1]] if together else [[0], [1]]
    for lot in lots:
        parameters = [nn.Parameter(piece) for index in lot for piece in pieces(tensors[index])]
        steps = [[piece for index in lot for piece in pieces(step[index])] for step in gradients]
        _after_steps(_trial(optimizer, parameters), parameters, steps)
    return tensors


def _difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> str:
    """For a report: how many elements, and by how much at most."""
    apart = torch.stack([(a.double() - b.double()).abs() for a, b in zip(one, other, strict=True)])
    count = int((apart != 0).sum())
    return f"{count} of {apart.numel()} elements of two tensors, updated together and alone, differ by up to {apart.max():.3g}"


def probe(optimizer: Optimizer, dtype: torch.dtype) -> Cut:
    """How finely the optimizer's tensors may be cut without changing a bit: at blocks, or between whole tensors only.

    Raises:
        TrainerError: if even whole tensors cannot be updated apart from each other.
    """
    name = type(optimizer).__name__
    try:
        together = _steps(optimizer, dtype, together=True, cuts=())
        apart = _steps(optimizer, dtype, together=False, cuts=())
    except TypeError as error:
        raise TrainerError(f"{name}.step() cannot be called without arguments ({error}); closures are not supported") from error
    if not all(map(torch.equal, together, apart)):
        raise TrainerError(
            f"{name} is not elementwise: one parameter's update depends on another's, so it cannot be spread over workers "
            f"({_difference(together, apart)}). "
            "Use an optimizer that updates each element, or at least each tensor, on its own (AdamW, SGD, Adafactor, Muon, ...)"
        )
    try:
        sliced = _steps(optimizer, dtype, together=True, cuts=(64 * 5, BLOCK, 2 * BLOCK + 64))
    except (RuntimeError, ValueError, IndexError):  # it wants matrices
        return "tensor"
    return "block" if all(map(torch.equal, together, sliced)) else "tensor"


def writes_gradients(optimizer: Optimizer, dtype: torch.dtype) -> bool:
    """Whether the optimizer's step changes the gradients that it is given, which others still need."""
    tensor = torch.linspace(-1, 1, BLOCK, dtype=torch.float32).to(dtype).view(64, -1)
    parameter, gradient = nn.Parameter(tensor.clone()), tensor.clone()
    _after_steps(_trial(optimizer, [parameter]), [parameter], [[gradient]])
    return not torch.equal(gradient, tensor)


def state_bytes(optimizer: Optimizer, dtype: torch.dtype) -> float:
    """Bytes of state that the optimizer keeps for one element of a parameter, measured on a small one."""
    parameter = nn.Parameter(torch.linspace(-1, 1, BLOCK, dtype=torch.float32).to(dtype).view(64, -1))
    trial = _trial(optimizer, [parameter])
    parameter.grad = parameter.detach().clone()
    trial.step()
    values = [value for value in trial.state[parameter].values() if isinstance(value, torch.Tensor) and value.ndim]
    return sum(value.numel() * value.element_size() for value in values) / BLOCK


class ShardedOptimizer:
    """The user's optimizer over this worker's own shards, and a second instance of it over the shards it keeps for others.

    The second one *replays* what owners did: the same update of the same shard, with the same gradient and settings, has the same bits.
    """

    def __init__(self, optimizer: Optimizer, model: LayeredModel) -> None:
        self.optimizer = optimizer
        self._model = model
        self._group_of: dict[str, int] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = model.name_of(parameter)
                if name is None:
                    raise TrainerError(f"parameter group {number} of the optimizer holds a tensor that is not a parameter of the model")
                self._group_of[name] = number
        self._initial = {name: state for parameter, state in optimizer.state.items() if (name := model.name_of(parameter)) is not None}
        self._writes_gradients = writes_gradients(optimizer, model.dtype(model.vectors[0].home))
        self.owned, self.kept = self._updater(optimizer), self._updater(_second(optimizer))

    def _updater(self, optimizer: Optimizer) -> Updater:
        return Updater(optimizer, self._model.spec, self._group_of, writes_gradients=self._writes_gradients)

    def initial(self, layer: int, interval: Interval, run: torch.Tensor) -> Shard:
        """The shard of an interval before the first step: its parameters are in `run`."""
        shard = Shard(layer=layer, interval=interval, memory={PARAM: run})
        for parameter, start, stop in shard.parameters(self._model.spec):
            for name, value in self._initial.get(parameter.name, {}).items():
                scalars = shard.scalars.setdefault(parameter.name, {})
                if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or (name == "step" and not value.ndim):
                    if isinstance(value, torch.Tensor) and value.numel() > 1 and self._model.spec.cut == "block":
                        raise TrainerError(
                            f"the optimizer's state of {parameter.name} has shape {tuple(value.shape)}, the parameter {parameter.shape}: "
                            "cannot cut it"
                        )
                    scalars[name] = value.clone() if isinstance(value, torch.Tensor) else value
                    continue
                memory = shard.memory.setdefault(name, torch.zeros(interval.elements, dtype=value.dtype))
                offset = interval.start - parameter.start
                memory[start:stop] = value.detach().reshape(-1)[start + offset : stop + offset]
                scalars[name] = RUN
        return shard

    def step(self, gradients: Sequence[OwnedGradient], scale: Scale) -> None:
        """Scales the gradient sums in place and updates the owned shards; a parameter without gradient is skipped."""
        for gradient in gradients:
            scale(gradient.memory)
        self.owned.step({(gradient.layer, gradient.interval.start): gradient.parts for gradient in gradients})

    def names(self) -> list[tuple[str, ...]]:
        """The parameters of each group, in the order of the model."""
        return [
            tuple(name for name, group in self._group_of.items() if group == number) for number in range(len(self.optimizer.param_groups))
        ]

    def settings(self) -> list[dict[str, Any]]:
        """Every group's settings, such as its learning rate: copies."""
        return [{name: copied(value) for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]

    def replay(self, gradients: Mapping[tuple[int, int], Parts], settings: Sequence[Mapping[str, Any]]) -> None:
        """Updates shards kept for others as their owner did, with the groups' settings of that step."""
        for group, values in zip(self.kept.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.kept.step(gradients)

    def replayed(self, shard: Shard, scalars: Scalars, parts: Parts, settings: Sequence[Mapping[str, Any]]) -> Shard:
        """A copy of a shard kept for another worker, one update later."""
        later = Shard(
            layer=shard.layer,
            interval=shard.interval,
            memory={name: memory.clone() for name, memory in shard.memory.items()},
            scalars=scalars,
        )
        updater = self._updater(_second(self.optimizer))
        for group, values in zip(updater.optimizer.param_groups, settings, strict=True):
            group.update(values)
        updater.bind([later])
        updater.step({(later.layer, later.interval.start): parts})
        later.scalars = updater.scalars(later)
        return later

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state of what is owned here."""
        return sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


def _second(optimizer: Optimizer) -> Optimizer:
    """Another instance of the same kind, with groups and state of its own."""
    second = copy.copy(optimizer)
    second.__dict__.pop("step", None)  # a scheduler may have put a wrapper bound to the user's instance there
    second.state = defaultdict(dict)
    second.param_groups = [{**group, "params": []} for group in optimizer.param_groups]
    return second


Scale = Callable[[torch.Tensor], Any]


def scaling(denominator: float, clip: float) -> Scale:
    """Divides once by the sum of weights; multiplies by the clip factor where it is below 1."""

    def scale(gradient: torch.Tensor) -> None:
        if denominator != 1.0:
            gradient.div_(denominator)
        if clip < 1.0:
            gradient.mul_(clip)

    return scale
