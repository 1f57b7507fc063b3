"""A training script as its author wrote it: nothing in it knows of faults."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import elastic


def train(steps: int) -> str | None:
    """A small regression; returns the digest of its parameters."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6)]
    inputs = torch.randn(128, 32)
    trainer = elastic.Trainer(
        layers,
        lambda output, batch: functional.mse_loss(output, batch[1]),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        torch.utils.data.TensorDataset(inputs, inputs.flip(1)),
        batch_size=16,
        micro_batch_size=2,
        seed=1,
    )
    for _ in trainer.run(steps):
        pass
    return trainer.digest()


if __name__ == "__main__":
    print(elastic.run(train, workers=2, args=[100]).value)
