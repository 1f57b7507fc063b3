"""A training in float16 whose loss scale shrinks and grows: for workers of `harness.run`, of real jobs, and in plain torch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import elastic
from elastic.engine import loss_scale
from tests.engine import models

STEPS, GROWS_AFTER, BATCH = 14, 3, 24


def large(output: torch.Tensor, batch: Any) -> torch.Tensor:
    """A loss whose gradient does not fit into float16 with the first loss scale."""
    return 300.0 * models.cross_entropy(output, batch)


def rows(size: int) -> Callable[[int, int], Any]:
    """Micro-batches of so many samples."""
    data = models.Rows()

    def batch(step: int, micro_batch: int) -> Any:
        found = [data[(step * BATCH + micro_batch * size + place) % len(data)] for place in range(size)]
        return torch.stack([x for x, _ in found]), torch.tensor([y for _, y in found])

    return batch


def layers(dropout: float) -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Linear(models.WIDTH, models.WIDTH), *(models.Block(dropout) for _ in range(3)), models.Head()]


def trainer(dropout: float, micro_batch_size: int, loss: Any, **more: Any) -> elastic.Trainer:
    """A trainer; `more` are further arguments."""
    sizes = {"batch_size": BATCH, "micro_batch_size": micro_batch_size, "seed": 11}
    return elastic.Trainer(layers(dropout), loss, models.adamw, rows(micro_batch_size), **sizes, **more)


def train(
    job: Any, dropout: float = 0.1, micro: int = 4, steps: int = STEPS, dies: dict[str, int] | None = None, saved: str | None = None
) -> dict[str, Any]:
    """Returns what each step reported, with the scale after it, and the digest. The workers in `dies` are killed in these steps."""
    loss_scale.GROWS_AFTER = GROWS_AFTER
    enter = job.enter

    def entered(phase: str, step: int, micro_batch: int = -1) -> None:
        enter(phase, step, micro_batch)
        if phase == "reduce" and (dies or {}).get(str(job.worker)) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    job.enter = entered
    made = trainer(dropout, micro, large, autocast=torch.float16, loss_scale="dynamic", checkpoint=saved)
    seen = [[r.step, r.loss, r.grad_norm if r.skipped is None else None, r.skipped, made.loss_scale] for r in made.run(steps)]
    return {"digest": made.digest(), "seen": seen}


def exact(_: Any, scale: float | None) -> Any:
    """A training in float32, with a fixed scale."""
    made = trainer(0.1, 4, models.cross_entropy, loss_scale=scale)
    return [(r.loss, r.grad_norm) for r in made.run(4)], made.digest()


def plain(_: Any = None) -> list[Any]:
    """The same in plain torch with its GradScaler: step, loss, whether it was skipped, and the scale after it."""
    model, data = nn.Sequential(*layers(0.0)), rows(BATCH)
    optimizer = models.adamw([*model.parameters()])
    scaler = torch.amp.GradScaler("cpu", growth_interval=GROWS_AFTER)  # pyright: ignore[reportPrivateImportUsage]
    found = []
    for step in range(STEPS):
        batch = data(step, 0)
        with torch.autocast("cpu", torch.float16):
            loss = large(model(batch[0]), batch)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        found.append((step, loss.item(), scaler.get_scale() < before, scaler.get_scale()))
    return found
