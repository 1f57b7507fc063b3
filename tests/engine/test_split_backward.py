"""Tests that a backward in two parts gives the bits of a whole one, and that only what waits for nothing is left for the second."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from elastic.engine.split_backward import first_part


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(x)).view(2, 8, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return x + self.out(functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(2, 8, 32))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv1d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.norm(self.one(x)))


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.shared(torch.tanh(self.shared(x))))


class Added(nn.Module):
    """The gradient of what is added is the very tensor that arrives at the product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.added = nn.Linear(32, 32), nn.Parameter(torch.randn(2, 8, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.added


class OfConstants(nn.Module):
    """One product does not depend on the input, so no gradient passes through it on the way there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.table(torch.ones(32))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.unused = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.unused(x).detach()


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.out(functional.gelu(self.linear(x))).float()


MODELS = {
    "feed-forward": (lambda: nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), 4),
    "attention": (Attention, 3),
    "convolution": (Convolution, 2),
    "used twice": (UsedTwice, 2),
    "added": (Added, 2),
    "of constants": (OfConstants, 2),
    "unused": (Unused, 2),
    "cast": (Cast, 2),
}
"""Each model, and how many of its parameters are left for the second part: at least."""


def run(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    leaf = torch.randn(2, 8, 32, requires_grad=True)
    output = module(leaf.view_as(leaf))
    return leaf, output, torch.randn_like(output)


@pytest.mark.parametrize("name", MODELS)
def test_two_parts_have_the_bits_of_one(name):
    torch.manual_seed(0)
    build, later = MODELS[name]
    module = build()
    parameters = list(module.parameters())
    leaf, output, gradient = run(module)
    output.backward(gradient)
    wanted = [leaf.grad, *(parameter.grad for parameter in parameters)]
    for parameter in parameters:
        parameter.grad = None
    leaf, output, gradient = run(module)
    left = first_part([output], [gradient], [leaf], parameters)
    assert left is not None
    assert all(parameter.grad is None for parameter in parameters)
    assert sum(len(operands) for _, _, operands in left.products) >= later
    early = leaf.grad.clone()  # pyright: ignore[reportOptionalMemberAccess]
    left.compute()
    found = [early, *(parameter.grad for parameter in parameters)]
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, early)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (torch.equal(one, other) and one.stride() == other.stride())  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]


def test_gradients_may_be_written_to_as_soon_as_they_are_there():
    module = Added()
    leaf, output, gradient = run(module)
    output.backward(gradient)
    wanted = module.linear.weight.grad
    module.zero_grad()
    leaf, output, gradient = run(module)
    left = first_part([output], [gradient], [leaf], list(module.parameters()))
    assert left is not None
    for _, found in left.found:
        assert found is not None
        found.zero_()
    left.compute()
    assert wanted is not None
    assert torch.equal(module.linear.weight.grad, wanted)  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_split_is_left_alone():
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 32)
    leaf, output, gradient = run(norm)
    assert first_part([output], [gradient], [leaf], list(norm.parameters())) is None
    leaf, output, gradient = run(linear)
    assert first_part([output], [gradient], [leaf.detach()], list(linear.parameters())) is None
    linear.weight.register_hook(lambda gradient: gradient * 2)
    assert first_part([output], [gradient], [leaf], list(linear.parameters())) is None
    output.backward(gradient)
    assert linear.weight.grad is not None
