"""Our side's train function."""

from __future__ import annotations

import time
from typing import Any

from subject import SEED, build_model, build_optimizer, build_text, cross_entropy

import elastic


def train(_job: elastic.Job, batch: int, micro_batch: int, steps: int) -> dict[str, Any] | None:
    """The times at which steps were yielded on the leader, their losses, and how many layers each stage had."""
    model = build_model()
    trainer = elastic.Trainer(
        model, cross_entropy, build_optimizer(model), build_text(), batch_size=batch, micro_batch_size=micro_batch, seed=SEED
    )
    stamps, losses = [], []
    for report in trainer.run(steps):
        stamps.append(time.monotonic())
        losses.append(report.loss)
    workers = trainer.statistics()
    if workers is None:
        return None
    layers = {worker["stage"]: len(worker["layers"]) for worker in workers}
    return {"stamps": stamps, "losses": losses, "cut": [layers[stage] for stage in sorted(layers)]}
