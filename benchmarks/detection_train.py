"""The training of `detection_hosts.py`: small, with the time of each step, and a storage of checkpoints that may be slow."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic

_WIDTH = 48


def train(job: Any, steps: int, pause_s: float = 0.0, folder: str | None = None, storage_s: float = 0.0) -> dict[str, Any]:
    """Trains, with a pause in each loop body. With `folder` it saves twice, at a storage that takes `storage_s` seconds for each save."""
    torch.manual_seed(7)
    layers = [nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(5)]
    inputs = torch.randn(160, _WIDTH)
    saves: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "every": max(1, steps // 2)}
    trainer = elastic.Trainer(
        layers,
        lambda output, batch: functional.mse_loss(output, batch[1]),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        torch.utils.data.TensorDataset(inputs, inputs.flip(1)),
        batch_size=16,
        micro_batch_size=2,
        seed=3,
        **saves,
    )
    if storage_s:
        _slow_storage(storage_s)
    at = []
    for _ in trainer.run(steps):
        at.append(time.monotonic())
        time.sleep(pause_s)
    return {"digest": trainer.digest(), "at": at}


def _slow_storage(seconds: float) -> None:
    """Makes each thread that saves wait so long at its first `fsync`, as a busy storage does."""
    sync, waited = os.fsync, threading.local()

    def slow(fd: Any) -> None:
        if not hasattr(waited, "once"):
            waited.once = True
            time.sleep(seconds)
        sync(fd)

    os.fsync = slow
