"""ZeRO-1: the user's optimizer instance over the pieces of parameters that this worker owns.

The instance stays the user's own, so schedulers bound to it go on working; only the tensors in its groups are exchanged for
views of the owned runs. A probe at the start tells whether that changes bits.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from elastic.engine.model import LayeredModel
from elastic.engine.reducer import OwnedGradient
from elastic.errors import TrainerError
from elastic.layout.layout import Interval
from elastic.layout.regions import BLOCK, Cut, ParameterSpec


def _trial(optimizer: Optimizer, parameters: Sequence[torch.Tensor]) -> Optimizer:
    """A fresh optimizer of the same kind and first group's settings, over other tensors."""
    trial = copy.copy(optimizer)
    trial.__dict__.pop("step", None)  # a scheduler may have put a wrapper bound to the user's instance there
    trial.state = defaultdict(dict)
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
            f"{name} is not elementwise: one parameter's update depends on another's, so it cannot be spread over workers. "
            "Use an optimizer that updates each element, or at least each tensor, on its own (AdamW, SGD, Adafactor, Muon, ...)"
        )
    try:
        sliced = _steps(optimizer, dtype, together=True, cuts=(64 * 5, BLOCK, 2 * BLOCK + 64))
    except (RuntimeError, ValueError, IndexError):  # it wants matrices
        return "tensor"
    return "block" if all(map(torch.equal, together, sliced)) else "tensor"


class ShardedOptimizer:
    """The update of this worker's intervals."""

    def __init__(self, optimizer: Optimizer, model: LayeredModel) -> None:
        self.optimizer = optimizer
        self._model = model
        self._cut = model.spec.cut
        self._group_of: dict[str, int] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                name = model.name_of(parameter)
                if name is None:
                    raise TrainerError(f"parameter group {number} of the optimizer holds a tensor that is not a parameter of the model")
                self._group_of[name] = number
        self._initial = {name: state for parameter, state in optimizer.state.items() if (name := model.name_of(parameter)) is not None}
        self._pieces: dict[tuple[int, int], list[nn.Parameter | None]] = {}

    def own(self, owned: Sequence[tuple[int, Interval]]) -> None:
        """Puts the owned pieces into the optimizer's groups."""
        for group in self.optimizer.param_groups:
            group["params"] = []
        self.optimizer.state.clear()
        self._pieces = {(layer, interval.start): self._cut_pieces(layer, interval) for layer, interval in owned}

    def _cut_pieces(self, layer: int, interval: Interval) -> list[nn.Parameter | None]:
        pieces: list[nn.Parameter | None] = []
        for parameter in self._model.spec.layers[layer].parameters:
            start, stop = max(parameter.start, interval.start), min(parameter.stop, interval.stop)
            if start >= stop:
                continue
            number = self._group_of.get(parameter.name)
            if number is None:
                pieces.append(None)  # not given to the optimizer: never updated, as in torch
                continue
            run = self._model.run(layer, start, stop)
            piece = nn.Parameter(run.view(parameter.shape) if self._cut == "tensor" else run)
            self.optimizer.param_groups[number]["params"].append(piece)
            if parameter.name in self._initial:
                self.optimizer.state[piece] = {
                    name: self._cut_state(value, parameter, start, stop, piece) for name, value in self._initial[parameter.name].items()
                }
            pieces.append(piece)
        return pieces

    def _cut_state(self, value: Any, parameter: ParameterSpec, start: int, stop: int, piece: nn.Parameter) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if self._cut == "block" and value.numel() == parameter.size and value.shape == parameter.shape:
            return value.detach().reshape(-1)[start - parameter.start : stop - parameter.start].clone().view(piece.shape)
        if self._cut == "block" and value.numel() > 1:
            raise TrainerError(
                f"the optimizer's state of {parameter.name} has shape {tuple(value.shape)}, the parameter {parameter.shape}: cannot cut it"
            )
        return value.clone()

    def step(self, gradients: Sequence[OwnedGradient], scale: Scale) -> None:
        """Scales the gradient sums in place and updates the owned pieces; a parameter without gradient is skipped."""
        for gradient in gradients:
            scale(gradient.memory)
            pieces = self._pieces[gradient.layer, gradient.interval.start]
            for piece, part in zip(pieces, gradient.parts, strict=True):
                if piece is not None:
                    piece.grad = None if part is None else part.view(piece.shape)
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            for piece in group["params"]:
                piece.grad = None

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state held here."""
        return sum(
            value.numel() * value.element_size()
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


Scale = Callable[[torch.Tensor], Any]


def scaling(denominator: float, clip: float) -> Scale:
    """Divides once by the sum of weights; multiplies by the clip factor where it is below 1."""

    def scale(gradient: torch.Tensor) -> None:
        if denominator != 1.0:
            gradient.div_(denominator)
        if clip < 1.0:
            gradient.mul_(clip)

    return scale
