"""A train function whose loop body logs metrics."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import elastic

STEPS = 16


def train(job: Any, folder: str, kills: list[int], saves: dict[str, Any]) -> None:
    """Trains. The leader dies in the loop body of each of the steps `kills`, alternately before and after logging."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    data = lambda step, micro_batch: torch.ones(2, 8)  # noqa: E731
    trainer = elastic.Trainer(model, lambda o, b: o.square().mean(), optimizer, data, batch_size=8, micro_batch_size=2, **saves)
    for report in trainer.run(STEPS):
        if report.workers < job.workers:
            time.sleep(0.2)  # gives a replacement time to join
        dies = report.leader and report.step in kills and not (marker := Path(folder, f"died-{report.step}")).exists()
        if dies and kills.index(report.step) % 2 == 0:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        trainer.log(Path(folder, "metrics.jsonl"), loss=report.loss)
        trainer.log(Path(folder, "metrics.jsonl"), more=[report.step])
        if dies:
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
