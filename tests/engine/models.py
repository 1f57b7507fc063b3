"""Small models of every kind that the engine must train exactly, as train functions for `harness.run`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import elastic

WIDTH = 48
SAMPLES = 96


class Rows:
    """A map-style dataset of (features, class)."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.sin(torch.arange(WIDTH) * 0.1 + index), index % 7


class Block(nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, 3 * WIDTH + 5)
        self.outer = nn.Linear(3 * WIDTH + 5, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.outer(functional.gelu(self.inner(self.norm(x)))))


class Scaled(nn.Module):
    """A layer with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) * self.scale)


class Transposed(nn.Module):
    """Gives a view that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).view(-1, 6, 8).transpose(1, 2)


class AfterTransposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).reshape(-1, WIDTH)


class Noise(nn.Module):
    """Draws from all three generators, but from Python's and NumPy's in some micro-batches of later steps only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + 0.01 * torch.randn_like(x)
        if torch.rand(1) < 0.2:
            x = x + 0.1 * random.random() + torch.from_numpy(np.random.normal(size=x.shape)).float() * 0.1
        return x


class Pair(nn.Module):
    """Two tensors and None across the boundary, in a dict."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"x": x * 2, "rest": (x.detach().abs(), None), "count": torch.arange(3)}


class FromPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, value: dict[str, Any]) -> torch.Tensor:
        return value["x"] * self.scale + value["rest"][0]


class Rare(nn.Module):
    """One parameter is used by some micro-batches only, one by none, and one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes = nn.Parameter(torch.ones(WIDTH))
        self.never = nn.Parameter(torch.ones(5000))
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)
        self.always = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.always(x) + self.frozen
        return x * self.sometimes if x.sum() > 0 else x


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight)


class TieFirst(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.randn(3, 70))
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight) + self.before.sum()


def cross_entropy(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(output, batch[1])


def weighted(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, float]:
    """A sum over the samples of even class only, and how many they are."""
    chosen = batch[1] % 2 == 0
    return functional.cross_entropy(output, batch[1], reduction="none")[chosen].sum(), float(chosen.sum())


def blocks(count: int = 3) -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(count)), Head()]


def tied() -> list[nn.Module]:
    shared = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1)
    head = Head()
    head.weight = shared
    return [TieFirst(shared), Block(), Block(), head]


def tied_thrice() -> list[nn.Module]:
    first, *middle, last = tied()
    return [first, *middle, TieFirst(last.weight), last]


def in_place() -> list[nn.Module]:
    return [nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)), nn.ReLU(inplace=True), Head()]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)


def two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    rest = [parameter for parameter in parameters if parameter.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-2}], lr=3e-3)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


def dict_batch(step: int, micro_batch: int) -> dict[str, torch.Tensor]:
    base = (step * 6 + micro_batch) * 4
    return {"x": torch.stack([torch.cos(torch.arange(WIDTH) * 0.2 + base + i) for i in range(4)]), "y": torch.arange(base, base + 4) % 7}


class TakesDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(batch["x"])


def dict_loss(output: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(output, batch["y"])


CASES: dict[str, dict[str, Any]] = {
    "dropout": {"model": blocks},
    "sequential": {"model": lambda: nn.Sequential(*blocks())},
    "tied": {"model": tied},
    "tied thrice": {"model": tied_thrice, "clip_norm": 0.5},
    "two groups, clipping, scheduler": {"model": blocks, "optimizer": two_groups, "clip_norm": 0.3, "scheduler": cosine},
    "momentum": {"model": blocks, "optimizer": momentum},
    "fused": {"model": blocks, "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True)},
    "whole tensors": {"model": tied, "optimizer": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2), "clip_norm": 1.0},
    "bf16 autocast": {"model": blocks, "autocast": torch.bfloat16},
    "bf16 parameters": {"model": lambda: [layer.bfloat16() for layer in blocks()], "autocast": torch.bfloat16},
    "checkpointing": {"model": blocks, "checkpoint_activations": True},
    "checkpointing in-place": {"model": in_place, "checkpoint_activations": True},
    "transposed view": {"model": lambda: [Transposed(), AfterTransposed(), Block(), Head()]},
    "in-place": {"model": in_place},
    "dict across": {"model": lambda: [nn.Linear(WIDTH, WIDTH), Pair(), FromPair(), Head()]},
    "unused and frozen": {"model": lambda: [nn.Linear(WIDTH, WIDTH), Rare(), Block(), Head()], "clip_norm": 0.7},
    "frozen first layers": {"model": lambda: [nn.Linear(WIDTH, WIDTH).requires_grad_(False), Block(), Block(), Head()]},
    "rare draws": {"model": lambda: [Noise(), nn.Linear(WIDTH, WIDTH), Noise(), Block(), Noise(), Head()]},
    "weighted loss": {"model": blocks, "loss": weighted},
    "dict micro-batches": {"model": lambda: [TakesDict(), Block(), Block(), Head()], "data": dict_batch, "loss": dict_loss},
    "grains of two": {"model": blocks, "grains": 3},
    "odd grains": {"model": blocks, "batch_size": 28},
}


def train(job: Any, name: str, steps: int = 4) -> dict[str, Any]:
    """Everything that must be equal to the last bit, and the shares that must add up."""
    options: dict[str, Any] = {
        "optimizer": adamw,
        "data": Rows(),
        "loss": cross_entropy,
        "batch_size": 24,
        "micro_batch_size": 4,
        **CASES[name],
    }
    build: Callable[[], Any] = options.pop("model")
    loss, optimizer, data = options.pop("loss"), options.pop("optimizer"), options.pop("data")
    torch.manual_seed(5)
    trainer = elastic.Trainer(build(), loss, optimizer, data, seed=11, **options)
    reports = [(r.step, r.loss, r.grad_norm, r.lr, torch.rand(1).item()) for r in trainer.run(steps)]
    return {"reports": reports, "digest": trainer.digest(), "statistics": trainer.statistics(), "layout": trainer.layout}
