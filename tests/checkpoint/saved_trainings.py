"""Train functions of real jobs that save checkpoints and resume from them."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import elastic
from elastic.checkpoint.directory import found
from elastic.checkpoint.objects import open_store
from elastic.checkpoint.owner import Owner, claim
from elastic.worker.engine import Engine
from tests.engine import models


def train(
    job: Any,
    directory: str,
    every: int | None,
    steps: int,
    plain: bool,
    keep: int | None,
    pause_s: float,
    disturb: Callable[[int, bool], None] = lambda step, leader: None,
) -> dict[str, Any] | None:
    """Trains; returns the losses of the job's steps, by step, and the digest after the last one. Calls `disturb` after each step."""
    torch.manual_seed(5)
    where = {} if plain else {"checkpoint": directory, "every": every, "keep": keep}
    trainer = elastic.Trainer(
        models.tied(),
        models.cross_entropy,
        models.two_groups,
        models.Rows(),
        batch_size=24,
        micro_batch_size=4,
        scheduler=models.cosine,
        clip_norm=0.3,
        seed=11,
        **where,
    )
    losses = {}
    for report in trainer.run(steps):
        losses[report.step] = [report.loss, report.grad_norm, report.lr]
        disturb(report.step, report.leader)
        time.sleep(pause_s)
    digest = trainer.digest()
    return {"losses": [[step, *values] for step, values in losses.items()], "digest": digest} if trainer.leader else None


ALIVE, DEAD = (f".tmp-step-00000001-e7-a0-{token:016x}" for token in range(2))
_HOURS_AGO = 7200.0


def beside_other_savers(job: Any, directory: str) -> dict[str, Any] | None:
    """Keeps two checkpoints; after its first step other jobs start to save into the same directory, and one of them died long ago."""

    def disturb(step: int, leader: bool) -> None:
        if leader and step == 0:
            for name, ago in ((ALIVE, 0.0), (DEAD, _HOURS_AGO)):
                path = Path(directory, name)
                path.mkdir()
                (path / "model-00001-of-00001.safetensors").touch()
                for touched in (path / "model-00001-of-00001.safetensors", path):
                    os.utime(touched, (time.time() - ago,) * 2)

    return train(job, directory, 2, 12, False, 2, 0.03, disturb)


class Bent(nn.Module):
    """Its parameter gets no gradient before the data ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.zeros(models.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bend if float(x[0, 0]) > 0 else x


def with_late_state(job: Any, directory: str, steps: int, bent_from: int) -> list[int] | None:
    """Saves after every step, unless the save before it is not over; how often the members told each other something in each step."""
    torch.manual_seed(5)
    exchanges = 0
    gather = Engine.gather

    def counted(self: Engine, value: dict[str, Any]) -> list[dict[str, Any]]:
        nonlocal exchanges
        exchanges += 1
        return gather(self, value)

    Engine.gather = counted
    trainer = elastic.Trainer(
        nn.Sequential(Bent(), nn.Linear(models.WIDTH, models.WIDTH)),
        lambda output, batch: output.square().mean(),
        models.adamw,
        lambda step, micro_batch: torch.full((4, models.WIDTH), 1.0 if step >= bent_from else -1.0),
        batch_size=16,
        micro_batch_size=4,
        checkpoint=directory,
        every=1,
    )
    found = []
    for report in trainer.run(steps):
        found.append(exchanges)
        exchanges = 0
        time.sleep(0.3 if report.leader else 0)
    return found if trainer.leader else None


def with_a_death_while_members_agree(job: Any, directory: str, number: int, when: str) -> dict[str, Any] | None:
    """Worker 1 dies in its exchange of that number, before it says anything or when it has heard the others."""
    gather, exchanges = Engine.gather, itertools.count(1)

    def deadly(self: Engine, value: dict[str, Any]) -> list[dict[str, Any]]:
        own = next(exchanges)
        if own == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = gather(self, value)
        if own == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    if job.worker == 1:
        Engine.gather = deadly
    return train(job, directory, 2, 9, False, None, 0.05)


def with_a_joiner_at_the_last_step(job: Any, directory: str) -> dict[str, Any] | None:
    """Worker 1 dies after step 3; its replacement is ready when only step 8, the last, is left, and the others have learned of it."""
    go = Path(directory, "go")
    waiting = time.monotonic() + 30

    def disturb(step: int, leader: bool) -> None:
        if (job.worker, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 7:
            go.touch()
            while not job.pause_requested:
                assert time.monotonic() < waiting, "nobody came"
                time.sleep(0.01)

    while job.worker == 3 and not go.exists():
        time.sleep(0.01)
    return train(job, directory, 2, 9, False, None, 0.05, disturb)


def into_memory(job: Any, steps: int, every: int | None) -> list[int | None]:
    """Returns the steps saved in this process's memory after a training, newest first."""
    train(job, "memory://run", every, steps, False, None, 0.1)
    return [entry.source.contents.step for entry in found(open_store("memory://run")) if entry.source is not None]


def beside_a_broken_disk(job: Any, directory: str, how: str) -> dict[str, Any] | None:
    """Saves after each of 9 steps, to a file system that fails from the end of step 1 until the end of step 5."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    root, aside = Path(directory), Path(directory + ".aside")

    def disturb(step: int, leader: bool) -> None:
        if how == "no space" and step in (1, 5):  # this process can write no file beyond 4 KiB
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]) if step == 1 else limits)
        if how == "no directory" and leader and step == 1:
            root.rename(aside)
            root.write_text("in the way")
        if how == "no directory" and leader and step == 5:
            root.unlink()
            aside.rename(root)

    return train(job, directory, 1, 9, False, None, 0.1, disturb)


def beside_another_training(job: Any, directory: str, theirs: str) -> dict[str, Any] | None:
    """Once step 4 is saved, a newer checkpoint of another training appears, and all workers die."""
    alien = Path(theirs, "step-00000008")

    def die_with_it() -> None:
        while alien.exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    def disturb(step: int, leader: bool) -> None:
        if leader and alien.exists() and any(entry.step == 4 for entry in found(open_store(directory))):
            alien.rename(Path(directory, alien.name))

    if alien.exists():
        threading.Thread(target=die_with_it, daemon=True).start()
    return train(job, directory, 4, 20, False, None, 0.1, disturb)


def in_a_directory_that_another_job_takes(job: Any, directory: str) -> dict[str, Any] | None:
    """Saves after each of 9 steps; after step 2 another job starts to save in the directory."""

    def disturb(step: int, leader: bool) -> None:
        if leader and step == 2:
            claim(open_store(directory), Owner(job="fedcba9876543210", began_from=None))

    return train(job, directory, 1, 9, False, None, 0.1, disturb)
