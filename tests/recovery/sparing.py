"""A train function of real jobs with spares, whose workers and spares are killed or stopped at given steps."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import elastic
from elastic.observe.activity import AGENT, ActivityReader
from tests.engine import models

LAYERS = 4
_READY_S = 60.0


def pid_of(directory: str, worker: int) -> int:
    """Returns the process of a worker of this host, dead or alive."""
    reader = ActivityReader(directory, worker)
    try:
        return reader.pid
    finally:
        reader.close()


def waits(directory: str, worker: int) -> bool:
    """Whether this worker is ready, and waits for orders of the agent."""
    with suppress(OSError, ValueError):
        reader = ActivityReader(directory, worker)
        try:
            return reader.standing(reader.read()).waits_for == AGENT
        finally:
            reader.close()
    return False


def until_ready(job: Any, workers: list[int]) -> None:
    """Waits until these spares are ready, and the agent has heard of it."""
    deadline = time.monotonic() + _READY_S
    while not all(waits(job.directory, worker) for worker in workers):
        if time.monotonic() > deadline:
            raise TimeoutError(f"spares {workers} are not ready")
        time.sleep(0.005)
    time.sleep(0.1)


def send(job: Any, numbers: list[int], what: int) -> None:
    """Sends a signal to these workers, to this one last."""
    for worker in sorted(numbers, key=lambda worker: worker == job.worker):
        os.kill(pid_of(job.directory, worker), what)


def cpu_s(pid: int) -> float:
    """Returns the processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train(job: Any, steps: int, acts: dict[str, list[Any]], pause_s: float = 0.0, evaluates: bool = False) -> dict[str, Any]:
    """`acts` by step: `[actor, spares to wait for, signal, workers and spares]`; the actor is a worker, and acts in the loop body."""
    torch.manual_seed(5)
    layers = [nn.Sequential(nn.Linear(models.WIDTH, models.WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(LAYERS)]
    optimizer = torch.optim.AdamW([parameter for layer in layers for parameter in layer.parameters()], lr=3e-3)
    trainer = elastic.Trainer(layers, models.cross_entropy, optimizer, models.Rows(), batch_size=24, micro_batch_size=4, seed=11)
    losses, counts = [], []
    for report in trainer.run(steps):
        losses.append(report.loss)
        counts.append(report.workers)
        act = acts.get(str(report.step))
        if act is not None and job.worker == act[0]:
            until_ready(job, act[1])
            send(job, act[3], act[2])
        if evaluates:
            losses.append(trainer.evaluate(models.Rows(), micro_batches=3))
        time.sleep(pause_s)
    return {"digest": trainer.digest(), "losses": losses, "workers": list(job.view.workers), "counts": counts}


def idle(job: Any, spare: int, seconds: float) -> dict[str, Any]:
    """Returns how many processor seconds a spare uses in that time."""
    used: list[float] = []
    for report in _tiny().run(6):
        if report.step == 2 and job.leader:
            until_ready(job, [spare])
            before = cpu_s(pid_of(job.directory, spare))
            time.sleep(seconds)
            used.append(cpu_s(pid_of(job.directory, spare)) - before)
    return {"used_s": used}


def _tiny() -> elastic.Trainer:
    layers = [nn.Linear(models.WIDTH, models.WIDTH)]
    return elastic.Trainer(layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=8, micro_batch_size=4)


KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)
