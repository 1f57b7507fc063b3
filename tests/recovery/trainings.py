"""Train functions of real jobs in which given workers die at a given moment."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import elastic
from elastic.comm import MessageKind
from elastic.comm.message import MessageHeader
from elastic.comm.sending import Sender
from elastic.engine import profile
from elastic.engine.profile import measure
from elastic.host.rundir import RunDirectory
from tests.engine import models

EVALUATED_EVERY = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_on_entering(job: Any, phase: str | None, step: int | None, times: int) -> None:
    """Has this worker die at once when it enters the phase of the step for the `times`-th time."""
    enter, left = job.enter, [times]

    def entered(now: str, number: int, micro_batch: int = -1) -> None:
        enter(now, number, micro_batch)
        left[0] -= (now, number) == (phase, step)
        if not left[0]:
            die()

    job.enter = entered


CASES: dict[str, dict[str, Any]] = {
    "tied, two groups, clipping, scheduler": {
        "model": models.tied,
        "optimizer": models.two_groups,
        "clip_norm": 0.3,
        "scheduler": models.cosine,
    },
    "momentum, bf16 autocast": {"model": models.blocks, "optimizer": models.momentum, "autocast": torch.bfloat16},
    "initial state": {
        "model": models.blocks,
        "optimizer": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, initial_accumulator_value=0.1),
    },
    "whole tensors, tied": {
        "model": models.tied,
        "optimizer": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
        "clip_norm": 1.0,
    },
}


def kill(directory: str, workers: list[int]) -> None:
    """SIGKILLs these members of the job, itself as the last one."""
    members = json.loads(RunDirectory(Path(directory)).members.read_text())["members"]
    for pid in sorted((member["pid"] for member in members if member["worker"] in workers), key=lambda pid: pid == os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Watched(models.Rows):
    """Evaluation data; calls `act` when first read."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        act, self.act = self.act, lambda: None
        act()
        return super().__getitem__(index)


class Log:
    """What this worker was given in each step and evaluation, in a file that remains after its death."""

    def __init__(self, folder: str, worker: int) -> None:
        self._path = Path(folder, f"steps-{worker}.jsonl")

    def add(self, kind: str, step: int, *values: float) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([kind, step, *values]) + "\n")


def train(
    job: Any,
    folder: str,
    name: str,
    steps: int,
    dies: dict[str, Any] | None = None,
    pause_s: float = 0.0,
    saves: dict[str, Any] | None = None,
    still: bool = False,
) -> dict[str, Any] | None:
    """`dies` tells where a worker does: ["start"], [phase, step, at which time it is there], ["evaluate", step], ["memory", step] or
    ["digest"]; at ["deletes", step] it deletes the run directory. With ["damages", step] it lives, and one bit of a message that it sends
    in that step is another one when it arrives.

    Or, at "loop" or "evaluate", who is killed by it: ["kills", where, step, workers]. `saves` are the Trainer's arguments for checkpoints.
    With `still` plans do not depend on what is measured here, and none moves a layer until somebody lost is replaced.
    """
    if still:
        profile.measure = _lasting
    fate = (dies or {}).get(str(job.worker), [None])
    if fate == ["start"]:
        die()
    options = {"data": models.Rows(), "loss": models.cross_entropy, "batch_size": 24, "micro_batch_size": 4, **CASES[name], **(saves or {})}
    build, loss, optimizer, data = (options.pop(part) for part in ("model", "loss", "optimizer", "data"))
    if len(fate) == 3:
        job.phase_delay = None
        die_on_entering(job, *fate)
    if fate[0] == "damages":
        _damage(fate[1])
    torch.manual_seed(5)
    trainer = elastic.Trainer(build(), loss, optimizer, data, seed=11, **options)
    log = Log(folder, job.worker)
    for report in trainer.run(steps):
        log.add("step", report.step, report.loss, report.grad_norm, report.lr, torch.rand(1).item())
        if fate == ["deletes", report.step]:
            shutil.rmtree(job.directory)
        if fate == ["memory", report.step]:
            raise MemoryError("no room")
        if fate[:3] == ["kills", "loop", report.step]:
            kill(job.directory, fate[3])
        if report.step % EVALUATED_EVERY == 1:
            act = lambda: None  # noqa: E731
            if fate == ["evaluate", report.step]:
                act = die
            elif fate[:3] == ["kills", "evaluate", report.step]:
                act = partial(kill, job.directory, fate[3])
            log.add("evaluation", report.step, trainer.evaluate(Watched(act), micro_batches=6), torch.rand(1).item(), random.random())
        time.sleep(pause_s)
    if fate == ["digest"]:
        time.sleep(0.1)  # the others wait for it there
        die()
    digest, statistics = trainer.digest(), trainer.statistics()
    return None if statistics is None else {"digest": digest, "workers": [found["worker"] for found in statistics]}


def _lasting(*arguments: Any) -> profile.LayerProfile:
    """Layers that take so long, it is said, that a replacement is there within a step. Of four layers, two and two are the best stages."""
    rows = measure(*arguments)
    return [[20.0 if place in (0, len(rows) - 1) else 10.0, 0.0, *row[2:]] for place, row in enumerate(rows)]


def _damage(step: int) -> None:
    """Flips a bit of the first tensors that this process sends in a step, without changing the sender's memory."""
    send, left = Sender.send, [1]

    def sent(self: Sender, header: MessageHeader, views: list[memoryview]) -> None:
        if (
            left[0]
            and header.tag.step == step
            and header.tag.kind in (MessageKind.ACTIVATION, MessageKind.GRADIENT, MessageKind.PARTIAL, MessageKind.PARAMETER)
        ):
            left[0] -= 1
            damaged = bytearray(views[-1])
            damaged[len(damaged) // 2] ^= 1
            views = [*views[:-1], memoryview(damaged)]
        send(self, header, views)

    Sender.send = sent


class Deadly(nn.Module):
    """Kills any process that reads a sample that begins with 100, as a fault in a kernel would."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] == 100.0:
            ctypes.string_at(0)
        return x


def poisoned(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(4, models.WIDTH)
    if (step, micro_batch) == (3, 4):
        x[0, 0] = 100.0
    return x, torch.arange(4)


def unloadable(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    if (step, micro_batch) == (3, 4):
        os.abort()
    return torch.ones(4, models.WIDTH), torch.arange(4)


def trains_on_poison(job: elastic.Job, data: str) -> None:
    """`data` names what kills: the model gets it, or it cannot even be loaded."""
    torch.manual_seed(5)
    layers = [Deadly(), *models.blocks()]
    batches = {"poisoned": poisoned, "unloadable": unloadable}[data]
    trainer = elastic.Trainer(layers, models.cross_entropy, models.adamw, batches, batch_size=24, micro_batch_size=4)
    for _ in trainer.run(8):
        pass
