"""Tests that a loop body sees the same values as in a plain loop, and affects the next step."""

from __future__ import annotations

import models
import torch
from torch import nn

import elastic


def plain(steps: int) -> list[float]:
    """The losses of an ordinary loop."""
    torch.manual_seed(5)
    model = nn.Sequential(models.Scaled(), models.Head())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(step, 0)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        body(step, model[0], optimizer)  # pyright: ignore[reportArgumentType]
    return losses


def body(step: int, layer: models.Scaled, optimizer: torch.optim.Optimizer) -> None:
    layer.scale = 1.0 + 0.1 * step
    optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
    optimizer.param_groups[0]["momentum"] = 0.5 if step % 2 else 0.9


def batch(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, models.WIDTH, generator=generator), torch.arange(8) % 4


def elastically(steps: int) -> list[float]:
    torch.manual_seed(5)
    model = nn.Sequential(models.Scaled(), models.Head())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = lambda output, data: nn.functional.cross_entropy(output, data[1])  # noqa: E731
    trainer = elastic.Trainer(model, loss, optimizer, batch, batch_size=8, micro_batch_size=8)
    losses = []
    for report in trainer.run(steps):
        losses.append(report.loss)
        body(report.step, model[0], optimizer)  # pyright: ignore[reportArgumentType]
    return losses


def test_a_loop_body_acts_as_in_a_plain_loop(lone_job) -> None:
    assert elastically(6) == plain(6)
