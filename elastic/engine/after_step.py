"""User functions that change parameters after each update: `trainer.after_step(f)`, as a part of the step.

`f(parameter, state)` is called on every owner, after the optimizer's update and before parameters are gathered, with each run of a
parameter that it owns (the whole tensor, if the optimizer is cut between tensors) and a dict for that run. Holders of replicas replay it.
The dict's contents are state like the optimizer's: tensors of the parameter's shape are sharded, moved and saved with it, and numbers go
along.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from elastic.engine import randomness
from elastic.errors import TrainerError
from elastic.layout.regions import BLOCK, CutRule
from elastic.memory import device
from elastic.memory.tensors import copy

AfterStep = Callable[[torch.Tensor, dict[str, Any]], Any]

PREFIX = "after_"
"""Prefix of the names of these states, which distinguishes them from the optimizer's."""

_CUTS = (0, 64 * 5, BLOCK, 2 * BLOCK + 64)


class AfterStepState(dict[str, Any]):
    """The state of f for one run of a parameter; `name` is the parameter's."""

    def __init__(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(values or {})
        self.name = name


def name_of(f: AfterStep) -> str:
    """Returns the function's name, as workers compare it."""
    return getattr(f, "__qualname__", type(f).__qualname__)


def _runs(f: AfterStep, dtype: torch.dtype, cuts: Sequence[int]) -> list[torch.Tensor]:
    """Returns a tensor and all its state after three calls, whole or cut at these elements."""
    generator = torch.Generator().manual_seed(21)
    whole, *moves = (device.placed(torch.randn((3, BLOCK + 1024), generator=generator).to(dtype)) for _ in range(4))
    edges = [*cuts, whole.numel()]
    cut = lambda tensor: [tensor.view(-1)[a:b] for a, b in itertools.pairwise(edges)] if len(cuts) > 1 else [tensor]  # noqa: E731
    pieces = [nn.Parameter(piece) for piece in cut(whole)]
    states = [AfterStepState("probe") for _ in pieces]
    with torch.no_grad():
        for move in moves:
            for piece, state, part in zip(pieces, states, cut(move), strict=True):
                piece.add_(part)
                f(piece, state)
    found = [whole.view(-1)]
    for name in sorted({name for state in states for name in state}):
        values = [state.get(name) for state in states]
        if all(isinstance(value, torch.Tensor) and value.shape == piece.shape for value, piece in zip(values, pieces, strict=True)):
            found.append(torch.cat([value.detach().reshape(-1) for value in values if value is not None]))
        elif any(isinstance(value, torch.Tensor) and value.numel() > 1 for value in values):
            raise TrainerError(f"{name_of(f)} keeps a tensor {name!r} that does not have the shape of the parameter that it is given")
        elif not all(isinstance(value, bool | int | float | torch.Tensor) for value in values):
            kind = type(values[0]).__name__
            raise TrainerError(f"{name_of(f)} keeps {name!r}, a {kind}: keep tensors of the parameter's shape, or numbers")
    return found


def check(f: AfterStep, dtype: torch.dtype, cut: CutRule) -> None:
    """Raises TrainerError unless f computes the same bits on any runs of a parameter and draws no random numbers."""
    drawn = randomness.torch_states()
    whole = _runs(f, dtype, (0,))
    if not all(map(torch.equal, drawn, randomness.torch_states())):
        raise TrainerError(
            f"{name_of(f)} draws random numbers, which would differ between layouts: an after_step function must draw none"
            f"{randomness.other_threads()}"
        )
    if cut == "tensor":
        return
    try:
        sliced = _runs(f, dtype, _CUTS)
    except (RuntimeError, ValueError, IndexError) as error:
        raise TrainerError(f"{name_of(f)} cannot be given runs of a parameter ({error}): it must treat each element on its own") from error
    if len(whole) != len(sliced) or not all(map(torch.equal, whole, sliced)):
        raise TrainerError(
            f"{name_of(f)} is not elementwise: its result on a run of a parameter differs from that on the whole, and owners call it on "
            "runs. It must treat each element on its own, as clamping and averaging do"
        )


def average(decay: float) -> AfterStep:
    """Returns a function that keeps an exponential moving average of each parameter as `state["average"]`, from the first step on."""

    def averaged(parameter: torch.Tensor, state: dict[str, Any]) -> None:
        mean = state.get("average")
        if mean is None:
            state["average"] = copy(parameter.detach())
        else:
            mean.mul_(decay).add_(parameter, alpha=1.0 - decay)

    averaged.__qualname__ = f"average({decay!r})"
    return averaged
