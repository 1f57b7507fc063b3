"""Train functions whose loop body changes the settings of the next steps, in jobs whose workers die at a given moment."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import elastic
from tests.engine import models
from tests.recovery.trainings import Watched, die, die_on_entering


def build() -> list[nn.Module]:
    return [models.Scaled(), nn.Sequential(nn.Dropout(0.1), models.Scaled()), nn.Linear(models.WIDTH, models.WIDTH), models.Head()]


def train(job: Any, folder: str, steps: int, dies: dict[str, Any] | None = None, saves: dict[str, Any] | None = None) -> str | None:
    """`dies`: by worker, the phase of a step or `loop` or `evaluate`, the step, and at which time it is there."""
    fate = (dies or {}).get(str(job.worker), [None, None, 1])
    die_on_entering(job, *fate)
    torch.manual_seed(5)
    layers = build()
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    trainer = elastic.Trainer(
        layers,
        models.cross_entropy,
        optimizer,
        models.Rows(),
        batch_size=24,
        micro_batch_size=4,
        scheduler=scheduler,
        seed=11,
        **saves or {},
    )
    group, log = optimizer.param_groups[0], Path(folder, f"steps-{job.worker}.jsonl")
    for report in trainer.run(steps):
        with log.open("a") as file:
            file.write(json.dumps([report.step, report.loss, report.grad_norm, report.lr]) + "\n")
        if fate[:2] == ["loop", report.step]:
            die()
        if saves and report.step == 5:
            time.sleep(0.5)  # the save after step 3 exists by then
        group["weight_decay"] = 0.01 * (report.step % 3)
        layers[0].scale = 1.0 + 0.1 * report.step
        if report.step == 2:
            group["lr"] *= 0.5
        act = die if fate[:2] == ["evaluate", report.step] else lambda: None
        value = trainer.evaluate(Watched(act), micro_batches=6)
        layers[1][1].scale = value / (1.0 + value)
        if report.step == 5:
            scheduler.step()
    return trainer.digest()
