"""The training of `detection_hosts.py`: small, with the time of each step, and a storage of checkpoints that may be slow."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic

_WIDTH = 48


def train(job: Any, steps: int, pause_s: float = 0.0, folder: str | None = None, storage_s: float = 0.0) -> dict[str, Any]:
    """Trains, with a pause in each loop body. With `folder` it saves twice, at a storage that takes `storage_s` seconds for each save."""
    saves: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "every": max(1, steps // 2)}
    trainer = _trainer(saves)
    if storage_s:
        _slow_storage(storage_s)
    for _ in trainer.run(steps):
        time.sleep(pause_s)
    return {"digest": trainer.digest()}


def until_stopped(job: Any, folder: str, pause_s: float) -> dict[str, Any]:
    """Trains until the step that the file `stop` in `folder` names. A file of each worker there gets its steps, and when they began."""
    trainer, step, stop = _trainer({}), 0, Path(folder, "stop")
    with Path(folder, str(job.worker)).open("a", buffering=1) as lines:
        for report in trainer.run(1_000_000):
            step = report.step
            lines.write(f"{step} {time.monotonic()}\n")
            if stop.exists() and step >= int(stop.read_text()):
                break
            time.sleep(pause_s)
    return {"step": step, "digest": trainer.digest()}


def digests(job: Any, steps: list[int]) -> dict[str, str]:
    """Trains up to the last of these steps, and returns the digest after each of them."""
    trainer, found = _trainer({}), {}
    for report in trainer.run(max(steps) + 1):
        if report.step in steps:
            found[str(report.step)] = trainer.digest()
    return found


def _trainer(options: dict[str, Any]) -> elastic.Trainer:
    torch.manual_seed(7)
    layers = [nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(5)]
    inputs = torch.randn(160, _WIDTH)
    return elastic.Trainer(
        layers,
        lambda output, batch: functional.mse_loss(output, batch[1]),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        torch.utils.data.TensorDataset(inputs, inputs.flip(1)),
        batch_size=16,
        micro_batch_size=2,
        seed=3,
        **options,
    )


def _slow_storage(seconds: float) -> None:
    """Makes each thread that saves wait so long at its first `fsync`, as a busy storage does."""
    sync, waited = os.fsync, threading.local()

    def slow(fd: Any) -> None:
        if not hasattr(waited, "once"):
            waited.once = True
            time.sleep(seconds)
        sync(fd)

    os.fsync = slow
