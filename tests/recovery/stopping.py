"""A train function whose loop has its own counter: lowers the rate every few steps, and stops early."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch import nn

import elastic

EVERY, LAST = 5, 17


class Counter:
    """Counts what the loop has seen."""

    def __init__(self) -> None:
        self.seen, self.best = 0, float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.best = state["seen"], state["best"]


def micro_batch(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(2, 64, generator=generator), torch.randn(2, 1, generator=generator)


def train(job: Any, registers: bool, kills: dict[str, int], options: dict[str, Any], steps: int = 1000) -> list[Any]:
    """Trains; worker `w` of `kills` dies in the body of that step, or of the first later one with all workers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    loss = lambda output, batch: (output - batch[1]).square().mean()  # noqa: E731
    trainer = elastic.Trainer(model, loss, optimizer, micro_batch, batch_size=8, micro_batch_size=2, **options)
    counter = Counter()
    if registers:
        trainer.register_for_checkpointing(counter)
    for report in trainer.run(steps):
        counter.seen += 1
        counter.best = min(counter.best, report.loss)
        if report.workers < job.workers:
            time.sleep(0.3)  # gives a replacement time to join
        elif kills.get(str(job.worker), steps) <= report.step:
            os.kill(os.getpid(), signal.SIGKILL)
        if counter.seen % EVERY == 0:
            optimizer.param_groups[0]["lr"] *= 0.5
        if counter.seen > LAST:
            break
    return [report.step, report.lr, counter.state_dict(), trainer.digest()]
