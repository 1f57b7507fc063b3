"""The train functions of our side."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from commits import CommitLog
from subject import SEED, build_model, build_optimizer, build_text, cross_entropy

import elastic


def train(_job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """Trains; returns the times at which steps were yielded on the leader, their losses, and the number of layers of each stage."""
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


def train_plain(job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """Trains as a plain loop."""
    model = build_model()
    optimizer = build_optimizer(model)
    sizes: dict[str, Any] = {"batch_size": batch, "micro_batch_size": micro_batch, "steps": steps, "seed": SEED}
    model, optimizer, loader = job.prepare(model, optimizer, build_text(), **sizes)
    stamps, losses = [], []
    for tokens, targets in loader:
        loss = cross_entropy(model(tokens), (tokens, targets))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.report is not None:
            stamps.append(time.monotonic())
            losses.append(loader.report.loss)
    return {"stamps": stamps, "losses": losses, "cut": [1]} if job.leader else None


def train_without_replication(job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """Trains without replicas and previous copies; such a job cannot recover from a death."""
    from elastic.snapshot.previous import PreviousCopies
    from elastic.snapshot.replication import Replicator

    def nothing(*_: object) -> None:
        pass

    for owner, names in ((Replicator, ("begin", "send", "expect", "confirm", "replay")), (PreviousCopies, ("take",))):
        for name in names:
            setattr(owner, name, nothing)  # in this worker only
    return train(job, batch, micro_batch, steps)


def train_logged(job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """Trains and logs commits in the run directory, since a worker that sees them may be killed. Returns the parameters' digest."""
    directory = Path(job.directory)
    _note_first_commits(job, directory / f"first-{job.worker}.jsonl")
    trainer = _trainer(batch, micro_batch)
    with CommitLog(directory, job.worker) as log:
        for report in trainer.run(steps):
            log.add(step=report.step, attempt_id=report.epoch, members=report.workers, loss=report.loss)
    digest = trainer.digest()
    return {"digest": digest} if trainer.leader else None


def _note_first_commits(job: elastic.Job, path: Path) -> None:
    """Logs this worker's message to the agent about an epoch's first commit; the previous epoch may already have yielded its step."""
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
