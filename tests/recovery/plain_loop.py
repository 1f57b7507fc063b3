"""The same training as a plain loop and under `elastic.run`.

It has a schedule in the body, early stopping by a counter, clamping, an average, BatchNorm and LARS.
"""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic
from tests.engine import models

STEPS, MICRO_BATCHES, SAMPLES, DECAY, LIMIT = 40, 4, 4, 0.9, 0.1


class Lars(torch.optim.Optimizer):
    """You, Gitman and Ginsburg 2017 (arXiv 1708.03888): a rate of its own for each tensor, by its norm and that of its gradient."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, trust: float = 0.02, adapts: bool = True) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "adapts": adapts})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["adapts"]:
                    weight, slope = parameter.norm(), gradient.norm()
                    gradient = gradient * torch.where((weight > 0) & (slope > 0), group["trust"] * weight / (slope + 1e-9), 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                parameter.sub_(state["momentum_buffer"], alpha=group["lr"])


def layers() -> list[nn.Module]:
    torch.manual_seed(7)
    width = models.WIDTH
    return [
        nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)),
        nn.Linear(width, 7),
    ]


def optimizer_of(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2)
    flat = [parameter for parameter in parameters if parameter.ndim == 1]
    return Lars([{"params": flat, "adapts": False}, {"params": [p for p in parameters if p.ndim > 1]}], lr=0.1)


def micro_batch_of(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    return torch.randn(SAMPLES, models.WIDTH, generator=generator), torch.randint(0, 7, (SAMPLES,), generator=generator)


class Patience:
    """Stops a loop when enough losses were not below those before them."""

    def __init__(self) -> None:
        self.last, self.left = math.inf, 9

    def over(self, loss: float) -> bool:
        self.left -= loss >= self.last
        self.last = loss
        return self.left <= 0

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def halve_sometimes(optimizer: torch.optim.Optimizer, step: int) -> None:
    if step % 6 == 5:
        for group in optimizer.param_groups:
            group["lr"] *= 0.5


def plain(kind: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, the model's state_dict, and the averaged parameters, of one process without this package."""
    model = nn.Sequential(*layers())
    optimizer = optimizer_of(kind, list(model.parameters()))
    losses, average, patience = [], {}, Patience()
    for step in range(STEPS):
        optimizer.zero_grad()
        values = []
        for micro_batch in range(MICRO_BATCHES):
            x, y = micro_batch_of(step, micro_batch)
            loss = functional.cross_entropy(model(x), y)
            (loss / MICRO_BATCHES).backward()
            values.append(float(loss.detach()))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.clamp_(-LIMIT, LIMIT)
                average[name] = average[name] * DECAY + parameter * (1 - DECAY) if name in average else parameter.clone()
        losses.append(sum(values) / MICRO_BATCHES)
        halve_sometimes(optimizer, step)
        if patience.over(losses[-1]):
            break
    return losses, model.state_dict(), average


def train(job: Any, kind: str, kills: dict[str, int]) -> dict[str, Any] | None:
    """Trains under `elastic.run`; worker `w` of `kills` dies in the body of the given step, or of the first later one with all workers."""
    parts = layers()
    optimizer = optimizer_of(kind, [parameter for part in parts for parameter in part.parameters()])
    loss = lambda output, batch: functional.cross_entropy(output, batch[1])  # noqa: E731
    trainer = elastic.Trainer(parts, loss, optimizer, micro_batch_of, batch_size=MICRO_BATCHES * SAMPLES, micro_batch_size=SAMPLES)

    @trainer.after_step
    def clamp(parameter: torch.Tensor, state: dict[str, Any]) -> None:
        parameter.clamp_(-LIMIT, LIMIT)

    trainer.average(DECAY)
    patience, losses = Patience(), {}
    trainer.register_for_checkpointing(patience)
    for report in trainer.run(STEPS):
        losses[str(report.step)] = report.loss
        halve_sometimes(optimizer, report.step)
        if report.workers < job.workers:
            time.sleep(0.3)  # gives a replacement time to join
        elif kills.get(str(job.worker), STEPS) <= report.step:
            os.kill(os.getpid(), signal.SIGKILL)
        if patience.over(report.loss):
            break
    average = trainer.state_dict("average")
    whole = trainer.state_dict()
    digest = trainer.digest()
    if not trainer.leader:
        return None
    plainly = lambda tensors: {name: tensor.flatten().tolist() for name, tensor in tensors.items()}  # noqa: E731
    return {"losses": losses, "digest": digest, "whole": plainly(whole), "average": plainly(average)}
