"""Tests common forms of losses, refusals by name, and evaluations with the same weights and random numbers on every layout."""

from __future__ import annotations

import math
from typing import Any

import harness
import models
import numpy as np
import pytest
import torch
from torch import nn

import elastic
from elastic.engine.boundary import contiguous
from elastic.engine.model import LayeredModel
from elastic.engine.stage import read_loss
from elastic.errors import TrainerError

ONE = torch.tensor(1.5)


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (ONE, (1.5, None)),
        (ONE.view(1, 1), (1.5, None)),
        ((ONE, 2), (1.5, 2.0)),
        ((ONE, 0), (1.5, 0.0)),
        ((ONE, torch.tensor(7)), (1.5, 7.0)),
        ((ONE, np.float32(0.5)), (1.5, 0.5)),
        ((ONE, torch.tensor(True)), (1.5, 1.0)),
    ],
)
def test_a_loss_is_a_scalar_with_or_without_a_weight(result: Any, expected: tuple[float, float | None]) -> None:
    value, weight = read_loss(result, "the loss")
    assert (float(value), weight) == expected


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ((ONE, torch.zeros(1, 8)), r"came with a prediction \(shape \(1, 8\)\) where its weight is expected: return the loss alone"),
        ((ONE, torch.zeros(1)), r"came with a prediction \(shape \(1,\)\)"),
        ((ONE, torch.tensor(1.0, requires_grad=True)), r"came with a tensor that has a gradient \(shape \(\)\)"),
        ((ONE, {}), "came with a dict where its weight is expected"),
        ((ONE, "2"), "came with a str where"),
        ((ONE, None), None),
        ((ONE, ONE, {}), r"is a tuple of 3 \(Tensor, Tensor, dict\): return a scalar tensor, or \(sum, weight\)"),
        ({"loss": ONE}, "is a dict: return a scalar tensor"),
        ((ONE, -1.0), r"has the weight -1\.0: a weight, such as a number of tokens, is finite and not below 0"),
        ((ONE, math.nan), "has the weight nan"),
        ((ONE, math.inf), "has the weight inf"),
        (1.5, "is a float: return a scalar tensor"),
        (torch.ones(3), r"is \(3,\): return a scalar tensor"),
        (torch.tensor(1j), "is complex"),
    ],
)
def test_what_is_no_loss_is_refused_by_name(result: Any, reason: str | None) -> None:
    if reason is None:
        assert read_loss(result, "the loss")[1] is None
        return
    with pytest.raises(TrainerError, match=reason):
        read_loss(result, "the loss")


def trainer_of(loss: Any, **options: Any) -> elastic.Trainer:
    torch.manual_seed(2)
    layers = [nn.Linear(models.WIDTH, models.WIDTH), models.Head()]
    return elastic.Trainer(layers, loss, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, **options)


@pytest.mark.parametrize("cut", [torch.Tensor.detach, lambda value: torch.tensor(value.item())])
def test_a_loss_that_is_cut_off_is_refused_when_the_trainer_is_made(lone_job, cut: Any) -> None:
    with pytest.raises(TrainerError, match="the loss of step 0, micro-batch 0 does not depend on the model's parameters"):
        trainer_of(lambda output, batch: cut(models.cross_entropy(output, batch)))


def test_a_micro_batch_without_tokens_weighs_nothing(lone_job) -> None:
    """For any loss: a sum of nothing, or a mean over nothing, which is NaN; it may also be detached."""

    def losses(empty: Any) -> list[float]:
        def loss(output: torch.Tensor, batch: Any) -> Any:
            value = models.cross_entropy(output, batch)
            return (empty(value), 0) if int(batch[1][0]) == 0 else (value, 1)

        return [report.loss for report in trainer_of(loss).run(3)]

    expected = losses(lambda value: value * 0)
    assert losses(lambda value: value * math.nan) == expected
    assert losses(lambda value: torch.zeros(())) == expected
    assert all(map(math.isfinite, expected))


class Odd:
    """Nine samples, of which only the last has a loss."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(models.WIDTH), torch.tensor(float(index == 8))


def test_a_short_micro_batch_weighs_as_much_as_its_samples(lone_job) -> None:
    trainer = trainer_of(lambda output, batch: (batch[1] + 0 * output.sum()).mean() if len(batch[1].shape) else output.sum())
    assert trainer.evaluate(Odd()) == pytest.approx(1 / 9)
    assert trainer.evaluate(Odd(), micro_batches=2) == 0.0
    weighted = trainer_of(lambda output, batch: (batch[1].float().sum() + 0 * output.sum(), len(batch[1])))
    assert weighted.evaluate(Odd()) == pytest.approx(1 / 9)


class Draws(nn.Module):
    """Draws in evaluation too, from all generators, as diffusion and masked losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(models.WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + torch.randn_like(x) + float(np.random.rand())


class NoisyRows(models.Rows):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        features, label = super().__getitem__(index)
        return features + torch.randn_like(features), label


def noisy(job: Any) -> list[float]:
    torch.manual_seed(1)
    layers = [nn.Linear(models.WIDTH, models.WIDTH), Draws(), Draws(), models.Head()]

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return models.cross_entropy(output + torch.randn_like(output), batch)

    trainer = elastic.Trainer(layers, loss, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4)
    return [trainer.evaluate(NoisyRows()) for _ in trainer.run(2)] + [trainer.evaluate(NoisyRows()) for _ in range(2)]


@pytest.mark.slow
def test_draws_in_evaluation_are_the_same_on_every_layout_and_each_time() -> None:
    (alone,) = harness.run(noisy, workers=1)
    assert alone[-1] == alone[-2]
    assert harness.run(noisy, workers=3, stages=2) == [alone] * 3


class ToFrequencies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(models.WIDTH, models.WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(self.linear(x)).conj()


class FromFrequencies(ToFrequencies):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.fft.irfft(z.conj(), n=models.WIDTH))


def complex_boundary(job: Any, again: bool) -> Any:
    torch.manual_seed(2)
    layers = [ToFrequencies(), FromFrequencies()]
    before = layers[0].linear.weight.detach().clone()
    trainer = elastic.Trainer(
        layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, checkpoint_activations=again
    )
    losses = [report.loss for report in trainer.run(3)]
    moved = layers[0].linear.weight.numel() == 0 or not torch.equal(layers[0].linear.weight, before)
    return losses, trainer.digest(), moved


@pytest.mark.slow
def test_complex_tensors_cross_with_their_gradients_recomputed_or_not() -> None:
    (alone,) = harness.run(complex_boundary, workers=1, args=(False,))
    assert alone[2]
    assert harness.run(complex_boundary, workers=1, args=(True,)) == [alone]
    over, _ = harness.run(complex_boundary, workers=2, stages=2, args=(True,))
    assert over == alone


def test_a_conjugate_view_is_made_real_memory() -> None:
    value = torch.tensor([1 + 2j, 3 - 1j]).conj()
    assert not contiguous(value).is_conj()
    assert torch.equal(contiguous(value), value)


def shared(how: str) -> nn.Module:
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    if how == "transposed":
        b.weight = nn.Parameter(a.weight.t())
    elif how == "data":
        b.weight.data = a.weight.data
    elif how == "part":
        b.weight = nn.Parameter(a.weight.data.view(-1)[32:].view(4, 8))
    elif how == "buffer":
        b.register_buffer("table", a.weight.data[:2])
    elif how == "frozen":
        b.weight = nn.Parameter(a.weight.data, requires_grad=False)
    elif how == "both frozen":
        a.weight.requires_grad_(False)
        b.weight = nn.Parameter(a.weight.data, requires_grad=False)
    elif how == "tied":
        b.weight = a.weight
    elif how == "one memory, other places":
        flat = torch.randn(128)
        a.weight, b.weight = nn.Parameter(flat[:64].view(8, 8)), nn.Parameter(flat[64:].view(8, 8))
    return nn.Sequential(a, b)


@pytest.mark.parametrize("how", ["transposed", "data", "part", "buffer", "frozen"])
def test_parameters_that_share_memory_without_being_one_are_refused(how: str) -> None:
    with pytest.raises(TrainerError, match=r"0\.weight and 1\.(weight|table) share memory|1\.(weight|table) and 0\.weight share memory"):
        LayeredModel(shared(how))


@pytest.mark.parametrize("how", ["tied", "one memory, other places", "both frozen", "nothing"])
def test_what_is_one_object_or_apart_is_trained(how: str) -> None:
    LayeredModel(shared(how))


def test_a_plateau_is_found_by_whoever_has_the_metric(lone_job) -> None:
    """The scheduler once got the training loss of each step, whatever metric the loop's body passed."""
    made: list[torch.optim.lr_scheduler.ReduceLROnPlateau] = []

    def plateau(optimizer: torch.optim.Optimizer) -> Any:
        made.append(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5))
        return made[0]

    trainer = trainer_of(models.cross_entropy, scheduler=plateau)
    rates = []
    for report in trainer.run(9):
        rates.append(report.lr)
        if report.step % 2:
            made[0].step(1.0)
    assert made[0].last_epoch == 4
    assert rates[0] == 3e-3
    assert rates[-1] == 1.5e-3
    assert rates[:6] == [3e-3] * 6
