"""Trains models of transformers that the Trainer cuts into layers itself."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

import elastic
from tests.checkpoint import pretrained


def digest(model: Any) -> str:
    """Of the model's parameters, by its own names."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        total.update(name.encode())
        total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


def train(job: elastic.Job, kind: str, directory: str) -> tuple[str, str, str]:
    """Returns the trainer's digest, that of the trained model, and the layout."""
    model = pretrained.build(kind)
    trainer = elastic.Trainer(
        model,
        pretrained.loss,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        pretrained.tokens,
        batch_size=8,
        micro_batch_size=2,
        checkpoint=directory,
    )
    for _ in trainer.run(2):
        pass
    whole, layout = trainer.state_dict(), trainer.layout
    model = pretrained.build(kind)
    model.load_state_dict(whole)
    return trainer.digest(), digest(model), layout
