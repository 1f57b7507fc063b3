"""Tests where each of torch's optimizers may be cut, as found by the probe."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import nn, optim

from elastic.engine.model import LayeredModel
from elastic.engine.probe import probe
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import TrainerError
from elastic.layout.layout import Interval
from elastic.layout.regions import BLOCK


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 4))]


ELEMENTWISE = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach amsgrad": lambda p: optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "Adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "fused SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p),
    "NAdam": lambda p: optim.NAdam(p),
    "RAdam": lambda p: optim.RAdam(p),
    "Adamax": lambda p: optim.Adamax(p),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Rprop": lambda p: optim.Rprop(p),
    "ASGD": lambda p: optim.ASGD(p),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, dtype in itertools.product(ELEMENTWISE, [torch.float32, torch.bfloat16, torch.float64])
        # torch 2.13 leaves random bits in some elements of its momentum, so the probe may refuse it or not notice.
        if (name, dtype) != ("fused SGD", torch.bfloat16)
    ],
)
def test_elementwise_optimizers_are_cut_at_blocks(name: str, dtype: torch.dtype) -> None:
    optimizer = ELEMENTWISE[name]([nn.Parameter(torch.ones(4, 4, dtype=dtype))])
    assert probe(optimizer).cut == "block"
    assert all(float(state["step"]) == 0 for state in optimizer.state.values()), "the probe left something in the user's optimizer"


@pytest.mark.parametrize("make", [lambda p: optim.Adafactor(p), lambda p: optim.Muon(p)])
def test_optimizers_of_whole_tensors_own_whole_tensors(make) -> None:
    assert probe(make(parameters())).cut == "tensor"


class PerTensorNorm(optim.Optimizer):
    """Scales each update by the norm of the tensor's gradient."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])


class GlobalNorm(PerTensorNorm):
    """Scales every update by the norm over all tensors."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            total = sum(p.grad.pow(2).sum() for p in group["params"]) ** 0.5
            for parameter in group["params"]:
                parameter.sub_(parameter.grad / total, alpha=group["lr"])


def test_an_optimizer_that_looks_at_the_whole_tensor_is_found_out() -> None:
    assert probe(PerTensorNorm(parameters())).cut == "tensor"


def test_an_optimizer_that_mixes_tensors_is_refused() -> None:
    with pytest.raises(TrainerError, match="GlobalNorm is not elementwise: one parameter's update depends on another's") as refused:
        probe(GlobalNorm(parameters()))
    assert re.search(r"\(\d+ of \d+ elements, updated together and apart, differ by up to 0\.", str(refused.value))


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(TrainerError, match=r"LBFGS\.step\(\) cannot be called without arguments"):
        probe(optim.LBFGS(parameters()))


@pytest.mark.parametrize("make", [lambda p: optim.AdamW(p, lr=0.1), lambda p: optim.Adagrad(p, initial_accumulator_value=0.3)])
def test_state_that_an_optimizer_brings_along_is_cut_like_its_parameters(make) -> None:
    """An optimizer that has taken steps, or one that starts with state, goes on from there on every owner."""
    torch.manual_seed(0)
    module = nn.Linear(100, 90)
    optimizer = make(module.parameters())
    module(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    name = "exp_avg" if "exp_avg" in optimizer.state[module.weight] else "sum"
    kept = optimizer.state[module.weight][name].clone()
    model = LayeredModel(module)
    sharded = ShardedOptimizer(optimizer, model)
    model.hold([0])
    interval = Interval(start=BLOCK, stop=2 * BLOCK, owner=0)
    sharded.owned.bind([sharded.initial(0, interval, model.run(0, BLOCK, 2 * BLOCK))])
    ((piece, state),) = optimizer.state.items()
    assert torch.equal(piece, model.flats[0][BLOCK : 2 * BLOCK])
    assert torch.equal(state[name], kept.flatten()[BLOCK : 2 * BLOCK])
    assert float(state["step"]) == 1


def test_a_stranger_among_the_optimizers_tensors_is_refused() -> None:
    with pytest.raises(TrainerError, match=r"parameter group 0 .* not a parameter of the model"):
        ShardedOptimizer(optim.AdamW(parameters()), LayeredModel(nn.Linear(4, 4)))


def test_the_probe_uses_cuts_that_a_layout_may_make() -> None:
    assert BLOCK % 64 == 0
