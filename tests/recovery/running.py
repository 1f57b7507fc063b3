"""A train function whose model has BatchNorm; returns the resulting parameters and running statistics."""

from __future__ import annotations

import os
import signal
import warnings
from typing import Any

import torch
from torch import nn

import elastic
from tests.engine import models


def build() -> nn.Sequential:
    torch.manual_seed(5)
    block = nn.Sequential(nn.BatchNorm1d(models.WIDTH), nn.ReLU(), nn.Linear(models.WIDTH, models.WIDTH))
    return nn.Sequential(nn.Linear(models.WIDTH, models.WIDTH), block, nn.BatchNorm1d(models.WIDTH, momentum=None), models.Head())


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(models.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9 if self.training else 1.0).add_(x.mean(0), alpha=0.1 if self.training else 0.0)
        return x - self.mean


def train(job: Any, steps: int, dies: dict[str, list[Any]], folder: str | None = None, average: bool = False) -> Any:
    """`dies` by worker: the phase of a step at which it does. `average` adds a layer that is not exact."""
    fate = dies.get(str(job.worker))
    enter, job.phase_delay = job.enter, None

    def entered(phase: str, step: int, micro_batch: int = -1) -> None:
        enter(phase, step, micro_batch)
        if [phase, step] == fate:
            os.kill(os.getpid(), signal.SIGKILL)

    job.enter = entered
    layers = [*build()[:-1], *([Average()] if average else []), build()[-1]]
    options: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "every": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = elastic.Trainer(
            layers,
            models.cross_entropy,
            models.adamw,
            models.Rows(),
            batch_size=24,
            micro_batch_size=4,
            seed=11,
            exact=not average,
            **options,
        )
        losses = [report.loss for report in trainer.run(steps)]
    evaluated = trainer.evaluate(models.Rows(), micro_batches=4)
    model = nn.Sequential(*layers)
    buffers = {name: buffer.tolist() for name, buffer in model.named_buffers()}
    values = trainer.statistics()
    everybody = trainer._runtime.together(lambda: trainer._engine.gather({"buffers": buffers}))
    return {
        "digest": trainer.digest(),
        "last": losses[-1],
        "evaluated": evaluated,
        "buffers": buffers,
        "everybody": [each["buffers"] == buffers for each in everybody],
        "workers": [each["worker"] for each in values or ()],
    }
