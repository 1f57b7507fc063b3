"""A train function of a real job in which one bit of memory is flipped at the end of a step, in a copy of a given role."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

import elastic
from elastic.worker import engine
from tests.engine import models
from tests.recovery import trainings


def memory(trainer: Any, role: str, state: str) -> torch.Tensor:
    """Returns the memory of a copy of that role on this worker."""
    current, worker = trainer._runtime.engine, trainer._job.worker
    owned = [*current._optimizer.owned.shards.values()]
    if role == "live":
        return owned[-1].memory[state]
    if role == "previous":
        return current.previous_copies.held[-1].memory[state]
    if role == "replica":
        return current.replicator.replicas[-1].shard.memory[state]
    held = [layer for layer in current.view.layout.layers if worker in layer.members]
    layer, interval = next((layer.layer, i) for layer in held for i in layer.intervals if i.owner != worker)
    return trainer._model.run(layer, interval.start, interval.stop)


def flip(where: torch.Tensor, bit: int = 6) -> None:
    """Flips one bit of the seventh element."""
    where.detach().reshape(-1).view(torch.uint8).numpy()[4 * 7 + 2] ^= 1 << bit


def spoil(trainer: Any, state: str) -> None:
    """The replica of a worker other than 0 is not what its owner has, and its holder has not seen it change: as if replayed wrongly."""
    current = trainer._runtime.engine
    replica = next(replica for replica in current.replicator.replicas if replica.shard.interval.owner)
    flip(replica.shard.memory[state])
    current.rest.note("replica", replica.shard.layer, replica.shard.interval.start, replica.step, replica.shard.memory)


def train(job: Any, name: str, steps: int, flips: dict[str, list[list[Any]]], every: int = 1) -> Any:
    """`flips` by worker, in order: [phase, step, role, state] each. Role "kill" ends the worker.

    All layers are digested each step, or in so many.
    """
    engine.period = lambda view: every  # pyright: ignore[reportAttributeAccessIssue]
    options = {"data": models.Rows(), "loss": models.cross_entropy, "batch_size": 24, "micro_batch_size": 4, **trainings.CASES[name]}
    build, loss, optimizer, data = (options.pop(part) for part in ("model", "loss", "optimizer", "data"))
    due = list(flips.get(str(job.worker), []))
    trainers: list[Any] = []
    enter, job.phase_delay = job.enter, None

    def entered(phase: str, step: int, micro_batch: int = -1) -> None:
        enter(phase, step, micro_batch)
        while due and due[0][:2] == [phase, step]:
            _, _, role, state = due.pop(0)
            if role == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if role == "wrong replica":
                spoil(trainers[0], state)
            else:
                flip(memory(trainers[0], role, state))

    job.enter = entered
    torch.manual_seed(5)
    trainers.append(elastic.Trainer(build(), loss, optimizer, data, seed=11, **options))
    losses = [report.loss for report in trainers[0].run(steps)]
    return trainers[0].digest(), losses
