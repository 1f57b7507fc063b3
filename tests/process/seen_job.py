"""A small training for tests of what can be seen of a job."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import nn

import elastic
from tests.engine import models


def train(job: Any, steps: int, dies: int | None = None, pause_s: float = 0.0) -> str | None:
    """Worker 1 dies in the loop body of step `dies`."""
    torch.manual_seed(0)
    model = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)] + [nn.Linear(8, 3)]
    data = [(torch.sin(torch.arange(8.0) + index), index % 3) for index in range(32)]
    optimizer = torch.optim.AdamW(nn.ModuleList(model).parameters(), lr=1e-2)
    trainer = elastic.Trainer(model, models.cross_entropy, optimizer, data, batch_size=8, micro_batch_size=2)
    print("every worker begins")
    for report in trainer.run(steps=steps):
        if report.step == dies and job.worker == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if report.leader:
            print(f"step {report.step} is done")
        time.sleep(pause_s)
    return trainer.digest()
