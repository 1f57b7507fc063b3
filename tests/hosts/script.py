"""A user's training script for several hosts; with fates of its own, of which the runtime is told nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic

WIDTH = 48


def train(job: Any, steps: int = 12, fates: dict[str, Any] | None = None, pause_s: float = 0.0) -> dict[str, Any]:
    """Trains. `fates` maps steps to `[worker, what]`: it kills its `agent`, or itself (`worker`), in the loop body, once.

    `fates["end"]` is `[worker, file, others, what]`: this worker kills its `agent`, or itself (`worker`), when the `others` are about to
    return, as they say in the file.
    """
    trainer = trainer_of()
    losses = []
    for report in trainer.run(steps):
        losses.append([report.step, report.loss])
        worker, what = (fates or {}).get(str(report.step), (None, None))
        if worker == job.worker:
            members = json.loads((Path(job.directory) / "members.json").read_text())
            os.kill(members["agent"] if what == "agent" else os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
        time.sleep(pause_s)
    digest = trainer.digest()
    if "end" in (fates or {}):
        end(job, *fates["end"])
    return {"losses": losses, "digest": digest}


def end(job: Any, worker: int, file: str, others: list[int], what: str = "agent") -> None:
    path = Path(file)
    if job.worker in others:
        with path.open("a") as lines:
            lines.write(f"{job.worker}\n")
    while job.worker == worker:
        if path.exists() and len(path.read_text().split()) == len(others):
            agent = json.loads((Path(job.directory) / "members.json").read_text())["agent"]
            os.kill(agent if what == "agent" else os.getpid(), signal.SIGKILL)
            time.sleep(60)
        time.sleep(0.01)


def saves(job: Any, checkpoint: str, pause_s: float) -> None:
    """Trains until it is stopped, and saves only then."""
    for _ in trainer_of(checkpoint=checkpoint, every=1_000_000).run(100_000):
        time.sleep(pause_s)


def trainer_of(**options: Any) -> elastic.Trainer:
    """The trainer of every test."""
    torch.manual_seed(7)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(5)]
    inputs = torch.randn(160, WIDTH)
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


def until(job: Any, folder: str, pause_s: float = 0.0) -> dict[str, Any]:
    """Trains until the step that the file `stop` in `folder` names. Files of each worker there name its newest step, and its process."""
    trainer, step = trainer_of(), 0
    (Path(folder) / f"{job.worker}.process").write_text(json.dumps({"pid": os.getpid(), "directory": job.directory}))
    for report in trainer.run(100_000):
        step = report.step
        progress = Path(folder) / f"{job.worker}.step"
        progress.with_suffix(".new").write_text(str(step))
        progress.with_suffix(".new").rename(progress)
        if (Path(folder) / "stop").exists() and step >= int((Path(folder) / "stop").read_text()):
            break
        time.sleep(pause_s)
    return {"steps": step, "digest": trainer.digest()}
