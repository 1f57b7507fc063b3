"""A train function whose workers die at given moments, and what each of them is given in its loop."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import elastic
from elastic.memory.segment import PAGE, MappedSegment
from elastic.observe import activity
from elastic.worker.segment_contents import SegmentContents
from tests.engine import models
from tests.recovery import running
from tests.recovery.trainings import Log, Watched, kill


class Counter(nn.Module):
    """Counts its forwards in a buffer, as a codebook's moving average would."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.steps.add_(1.0)
        return x


def half_frozen() -> list[nn.Module]:
    """The second stage of two has no gradient."""
    layers = models.blocks()
    for layer in layers[len(layers) // 2 :]:
        layer.requires_grad_(False)
    return layers


CASES: dict[str, dict[str, Any]] = {
    "adamw": {"model": models.blocks, "optimizer": models.adamw, "clip_norm": 0.5},
    "batchnorm": {"model": running.build, "optimizer": models.adamw},
    "average, momentum": {"model": models.blocks, "optimizer": models.momentum, "average": 0.9},
    "scheduler, objects, tied": {"model": models.tied, "optimizer": models.two_groups, "scheduler": models.cosine},
    "whole tensors": {"model": models.tied, "optimizer": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2)},
    "deep": {"model": lambda: models.blocks(7), "optimizer": models.adamw},
    "in place": {"model": lambda: [*models.in_place()[:3], *models.in_place()], "optimizer": models.adamw},
    "recompute, pairs": {
        "model": lambda: [models.Block(), models.Pair(), models.FromPair(), models.Transposed(), models.AfterTransposed(), models.Head()],
        "optimizer": models.adamw,
        "checkpoint_activations": True,
    },
    "unused, bf16": {
        "model": lambda: [nn.Linear(models.WIDTH, models.WIDTH), models.Rare(), models.Block(), models.Head()],
        "optimizer": models.adamw,
        "loss": models.weighted,
        "autocast": torch.bfloat16,
    },
    "half frozen": {"model": half_frozen, "optimizer": models.adamw},
    "counter": {"model": lambda: [*models.blocks()[:-1], Counter(), models.blocks()[-1]], "optimizer": models.adamw, "exact": False},
    "skips": {"model": running.build, "optimizer": models.adamw, "on_nonfinite": "skip"},
}

EXACT = sorted(name for name, case in CASES.items() if case.get("exact", True))
"""Cases whose results do not depend on the layout; other modules add more cases."""

EVALUATED_EVERY = 3
SKIPPED = 4


class Total:
    """Registered: what the loop has summed."""

    def __init__(self) -> None:
        self.total = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


class Poisoned(models.Rows):
    """Data of which one step cannot be applied."""

    def __call__(self, step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [self[(step * 24 + micro_batch * 4 + place) % models.SAMPLES] for place in range(4)]
        x = torch.stack([x for x, _ in samples])
        return x * (torch.nan if step == SKIPPED and micro_batch == 1 else 1.0), torch.tensor([y for _, y in samples])


def train(job: Any, folder: str, case: str, steps: int, fates: dict[str, list[Any]], saves: dict[str, Any] | None = None) -> Any:
    """`fates` says by worker who dies when: a list of the moment, its step, how often it comes until then, and what belongs to it.

    ["enter", step, times, phase, victims]; ["body", step, 1, victims]; ["evaluate", step, 1, victims];
    ["call", step, times, method, when, victims]: "before" or "after" a call of a method of SegmentContents;
    ["store", step, times, victims]: a store into the header, from the update of the step on; ["copy", None, times, victims]: of a part of
    another's segment; ["scribble", step, 1, what]; ["late", step, 1, others, victims]: with the decision on a step, when these
    have applied it. The step None is any step. Victims None are the worker alone.
    """
    fate = fates.get(str(job.worker), ["lives"])
    Fate(job, fate).install()
    options: dict[str, Any] = {"data": models.Rows(), "loss": models.cross_entropy, "batch_size": 24, "micro_batch_size": 4, **CASES[case]}
    if case == "skips":
        options["data"] = Poisoned().__call__
    build, loss, optimizer, data = (options.pop(part) for part in ("model", "loss", "optimizer", "data"))
    decay, total = options.pop("average", None), Total()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        layers = build()
        trainer = elastic.Trainer(layers, loss, optimizer, data, seed=11, **options, **(saves or {}))
        trainer.register_for_checkpointing(total)
        if decay is not None:
            trainer.average(decay)
        log = Log(folder, job.worker)
        for report in trainer.run(steps):
            total.total += 0.0 if report.skipped else report.loss
            log.add("step", report.step, str(report.loss), report.lr, total.total, torch.rand(1).item())
            if fate[:2] == ["body", report.step]:
                end(job, fate[3])
            if fate[:2] == ["scribble", report.step]:
                scribble(trainer, job, fate[3])
            if report.step % EVALUATED_EVERY == 1:
                act = partial(end, job, fate[3]) if fate[:2] == ["evaluate", report.step] else lambda: None
                log.add("evaluation", report.step, trainer.evaluate(Watched(act), micro_batches=6))
    buffers = {name: buffer.tolist() for name, buffer in nn.Sequential(*layers).named_buffers()}
    average = trainer.state_dict("average") if decay is not None else {}
    digest = trainer.digest()
    return {
        "digest": digest,
        "buffers": buffers,
        "average": {name: float(values.double().sum()) for name, values in average.items()},
        "total": total.total,
    }


class Fate:
    """Has this worker die, or kill others, at a moment that its own code reaches."""

    def __init__(self, job: Any, fate: list[Any]) -> None:
        self._job, self._fate = job, fate
        self._step, self._left = (fate[1], fate[2]) if len(fate) > 2 else (None, 0)
        self._now: int | None = None

    def install(self) -> None:
        """Puts the fault where it is to happen."""
        kind = self._fate[0]
        if kind in ("enter", "call", "store", "late"):
            job, enter = self._job, self._job.enter
            job.phase_delay = None

            def entered(phase: str, step: int, micro_batch: int = -1) -> None:
                enter(phase, step, micro_batch)
                self._now = step if phase == "apply" or self._now is not None else None
                if kind == "enter" and phase == self._fate[3] and self._step in (step, None):
                    self._count()
                if kind == "late" and phase == "apply" and step == self._step:
                    while not all(self._applied(other, step) for other in self._fate[3]):
                        time.sleep(0.01)
                    self._count()

            job.enter = entered
        if kind == "call":
            self._patch(SegmentContents, self._fate[3], self._fate[4], lambda *_: self._step in (self._now, None))
        elif kind == "store":
            self._patch(self._job.segment.header, "_write", "after", lambda *_: self._now is not None and self._now >= self._step)
        elif kind == "copy":
            self._patch(MappedSegment, "bytes_at", "before", lambda _, offset, size: offset >= PAGE)

    def _applied(self, worker: int, step: int) -> bool:
        doing = activity.read(self._job.directory, worker)
        return doing is not None and doing.step is not None and (doing.step, doing.phase == "replicate") >= (step, True)

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            end(self._job, self._fate[-1])

    def _patch(self, what: Any, name: str, when: str, counts: Callable[..., bool]) -> None:
        method = getattr(what, name)

        def patched(*arguments: Any) -> Any:
            if when == "before" and counts(*arguments):
                self._count()
            found = method(*arguments)
            if when == "after" and counts(*arguments):
                self._count()
            return found

        setattr(what, name, patched)


def end(job: Any, victims: list[int] | None) -> None:
    """SIGKILLs these members, or this worker."""
    if victims is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        kill(job.directory, victims)


def scribble(trainer: Any, job: Any, what: str) -> None:
    """Writes over this worker's segment as a faulty kernel might, and ends as such a process ends."""
    engine = trainer._engine
    owned = engine._optimizer.owned.shards.values()
    memory = {
        "live": [memory for shard in owned for memory in shard.memory.values()],
        "previous": [memory for held in engine.previous_copies.held for memory in held.memory.values()],
    }
    for each in memory.get(what, []):
        each.detach()[-1:].view(torch.uint8)[0] ^= 1
    if what == "header":
        job.segment.header._write(64, b"\x5a" * 960)
    os.kill(os.getpid(), signal.SIGSEGV)
