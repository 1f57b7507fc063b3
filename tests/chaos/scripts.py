"""Train functions that were not written for the harness, each with a quirk."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic

WIDTH = 24


def trainer_of(**options: Any) -> elastic.Trainer:
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    inputs = torch.sin(torch.arange(64 * WIDTH, dtype=torch.float32)).reshape(64, WIDTH)
    optimizer = torch.optim.AdamW([each for layer in layers for each in layer.parameters()], lr=1e-3)
    data = torch.utils.data.TensorDataset(inputs, inputs.flip(1))
    return elastic.Trainer(
        layers, lambda output, batch: functional.mse_loss(output, batch[1]), optimizer, data, batch_size=8, micro_batch_size=2, **options
    )


def plain(steps: int) -> None:
    """It has no seed, takes no job, and returns nothing."""
    for _ in trainer_of().run(steps):
        pass


def inexact(steps: int) -> None:
    for _ in trainer_of(exact=False).run(steps):
        pass


def saves(folder: str, steps: int) -> None:
    """It has a checkpoint directory of its own."""
    for _ in trainer_of(checkpoint=folder, every=5).run(steps):
        time.sleep(0.02)


def different_each_time(folder: str, steps: int) -> None:
    """All workers of a job begin alike, and each job otherwise."""
    path = os.path.join(folder, os.environ["TMPDIR"].replace("/", "_"))
    if not os.path.exists(path):
        with open(path, "w") as file:
            file.write(str(len(os.listdir(folder))))
    with open(path) as file:
        torch.manual_seed(int(file.read() or 0))
    for _ in trainer_of().run(steps):
        pass


def fails_after_a_loss(steps: int) -> None:
    """It goes on without faults and beyond a slow worker, and fails when the members change."""
    for report in trainer_of().run(steps):
        if report.epoch > 1:
            raise RuntimeError("it cannot bear another epoch")


def makes_no_trainer() -> None:
    pass


def fails(steps: int) -> None:
    for report in trainer_of().run(steps):
        if report.step == 3:
            raise RuntimeError("it fails without faults")
