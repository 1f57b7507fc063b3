"""A training whose parameters and optimizer state take much more memory than a process."""

from __future__ import annotations

import os
import signal

import torch
from torch import nn

import elastic

WIDTH, LAYERS = 2048, 12
BYTES = 4 * WIDTH * WIDTH * LAYERS  # of all parameters


def train(job: elastic.Job, killed: list[int]) -> str:
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    trainer = elastic.Trainer(
        model,
        lambda output, _: output.square().mean(),
        torch.optim.Adam(model.parameters(), lr=1e-3),
        _batch,
        batch_size=6,
        micro_batch_size=2,
    )
    for report in trainer.run(steps=6):
        if report.step == 2 and job.worker in killed:
            os.kill(os.getpid(), signal.SIGKILL)
    return trainer.digest()


def _batch(step: int, micro_batch: int) -> torch.Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(100 * step + micro_batch))
