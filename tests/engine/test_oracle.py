"""Tests the engine against plain torch: one autograd graph per micro-batch, gradients added in the documented order."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import elastic
from elastic.engine.data import batches


def plain(layers: list[nn.Module], steps: int, clip: float) -> list[torch.Tensor]:
    """Six micro-batches, six grains: ((0+1)+(2+3))+(4+5), divided by six."""
    model = nn.Sequential(*layers)
    parameters = list(model.parameters())
    optimizer = models.adamw(parameters)
    batch = batches(models.Rows(), batch_size=24, micro_batch_size=4, seed=11, collate=None)
    for step in range(steps):
        parts = []
        for micro_batch in range(6):
            data = batch(step, micro_batch)
            parts.append(torch.autograd.grad(models.cross_entropy(model(data[0]), data), parameters))
        for i, parameter in enumerate(parameters):
            g = [part[i] for part in parts]
            parameter.grad = (((g[0] + g[1]) + (g[2] + g[3])) + (g[4] + g[5])) / 6
        clip_grad_norm_(parameters, clip)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("checkpoint", [False, True])
def test_equals_plain_torch_bit_for_bit_without_clipping(lone_job, checkpoint: bool) -> None:
    def build() -> list[nn.Module]:
        torch.manual_seed(3)
        return [nn.Linear(48, 48), models.Block(dropout=0.0), models.Block(dropout=0.0), models.Head()]

    layers = build()
    trainer = elastic.Trainer(
        layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, seed=11, clip_norm=1e9,
        checkpoint_activations=checkpoint,
    )  # fmt: skip
    assert len(list(trainer.run(3))) == 3
    ours = [parameter for layer in layers for parameter in layer.parameters()]
    for mine, theirs in zip(ours, plain(build(), 3, 1e9), strict=True):
        assert torch.equal(mine, theirs)


def test_clipping_is_that_of_torch(lone_job) -> None:
    def build() -> list[nn.Module]:
        torch.manual_seed(3)
        return [nn.Linear(48, 48), models.Head()]

    layers = build()
    trainer = elastic.Trainer(
        layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, seed=11, clip_norm=0.01
    )
    norms = [report.grad_norm for report in trainer.run(3)]
    assert min(norms) > 0.01
    ours = [parameter for layer in layers for parameter in layer.parameters()]
    for mine, theirs in zip(ours, plain(build(), 3, 0.01), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_the_loop_sees_exactly_the_parameters_of_the_yielded_step(lone_job) -> None:
    def after(steps: int, *, leave_early: bool) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(3)
        layers = [nn.Linear(48, 48), models.Head()]
        trainer = elastic.Trainer(layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4)
        for report in trainer.run(10 if leave_early else steps):
            if report.step == steps - 1:
                break
        return [parameter.detach().clone() for layer in layers for parameter in layer.parameters()], trainer.step

    early, taken = after(2, leave_early=True)
    exact, _ = after(2, leave_early=False)
    assert taken == 2
    assert all(map(torch.equal, early, exact))


def test_a_loop_that_was_left_goes_on_where_it_stopped(lone_job) -> None:
    def losses(parts: list[int]) -> list[float]:
        torch.manual_seed(3)
        trainer = elastic.Trainer(
            [nn.Linear(48, 48), models.Block(), models.Head()],
            models.cross_entropy,
            models.adamw,
            models.Rows(),
            batch_size=24,
            micro_batch_size=4,
        )
        found = []
        for stop in parts:
            for report in trainer.run(6):
                found.append(report.loss)
                if report.step == stop:
                    break
        return found

    assert losses([1, 3, 5]) == losses([5])
    assert len(losses([5])) == 6


def test_a_stop_request_ends_at_the_step_boundary(lone_job) -> None:
    trainer = elastic.Trainer(
        [nn.Linear(48, 48), models.Head()], models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4
    )
    seen = []
    for report in trainer.run(50):
        seen.append((report.step, report.stopped))
        lone_job.stop_requested = report.step == 2
    assert seen == [(0, False), (1, False), (2, False), (3, True)]
    assert trainer.step == 4
