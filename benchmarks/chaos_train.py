"""The training of `chaos_defects.py`: with dropout, and so wide that an update takes some milliseconds."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import elastic

_WIDTH = 512


def train(steps: int) -> str | None:
    """Trains; returns the digest of all parameters."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6)]
    inputs = torch.randn(96, _WIDTH)
    trainer = elastic.Trainer(
        layers,
        lambda output, batch: functional.mse_loss(output, batch[1]),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        torch.utils.data.TensorDataset(inputs, inputs.flip(1)),
        batch_size=16,
        micro_batch_size=2,
        clip_norm=1.0,
        seed=1,
    )
    for _ in trainer.run(steps):
        pass
    return trainer.digest()
