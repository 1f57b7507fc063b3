"""Our side's train function."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from commits import CommitLog
from subject import SEED, build_model, build_optimizer, build_text, cross_entropy

import elastic


def train(_job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """The times at which steps were yielded on the leader, their losses, and how many layers each stage had."""
    trainer = _trainer(batch, micro_batch)
    stamps, losses = [], []
    for report in trainer.run(steps):
        stamps.append(time.monotonic())
        losses.append(report.loss)
    workers = trainer.statistics()
    if workers is None:
        return None
    layers = {worker["stage"]: len(worker["layers"]) for worker in workers}
    return {"stamps": stamps, "losses": losses, "cut": [layers[stage] for stage in sorted(layers)]}


def train_without_replication(job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """The same, with nothing kept of a worker's state elsewhere, nor of the step before: it cannot survive a death."""
    from elastic.snapshot.previous import PreviousCopies
    from elastic.snapshot.replication import Replicator

    def nothing(*_: object) -> None:
        pass

    for owner, names in ((Replicator, ("begin", "send", "expect", "confirm", "replay")), (PreviousCopies, ("take",))):
        for name in names:
            setattr(owner, name, nothing)  # in this worker only
    return train(job, batch, micro_batch, steps)


def train_logged(job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """Writes the commits into the run's directory, since those who see them may die; gives the parameters' digest."""
    directory = Path(job.directory)
    _note_first_commits(job, directory / f"first-{job.worker}.jsonl")
    trainer = _trainer(batch, micro_batch)
    with CommitLog(directory, job.worker) as log:
        for report in trainer.run(steps):
            log.add(step=report.step, attempt_id=report.epoch, members=report.workers, loss=report.loss)
    digest = trainer.digest()
    return {"digest": digest} if trainer.leader else None


def _note_first_commits(job: elastic.Job, path: Path) -> None:
    """Writes down what this worker tells the agent of an epoch's first commit, whose step may have been yielded in the epoch before."""
    send = job.send

    def noted(message: dict[str, Any]) -> None:
        if message["type"] == "committed":
            with path.open("a") as file:
                file.write(json.dumps(message) + "\n")
        send(message)

    job.send = noted


def _trainer(batch: int, micro_batch: int) -> elastic.Trainer:
    model = build_model()
    return elastic.Trainer(
        model, cross_entropy, build_optimizer(model), build_text(), batch_size=batch, micro_batch_size=micro_batch, seed=SEED
    )
