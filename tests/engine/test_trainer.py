"""Tests the arguments that a Trainer accepts, those it refuses, and the messages."""

from __future__ import annotations

import os
import random
import signal
from collections import OrderedDict, UserDict
from typing import Any

import harness
import models
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import elastic
from elastic.errors import NonFinite, NotInJob, TrainerError


def make(
    model: Any = None, loss: Any = models.cross_entropy, optimizer: Any = models.adamw, data: Any = None, **options: Any
) -> elastic.Trainer:
    options = {"batch_size": 24, "micro_batch_size": 4, **options}
    return elastic.Trainer(model or [nn.Linear(48, 48), models.Head()], loss, optimizer, models.Rows() if data is None else data, **options)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.ones(48), 1


class Number(nn.Module):
    def forward(self, x: torch.Tensor) -> float:
        return float(x.detach().sum())


class Poison(nn.Module):
    """NaN for one micro-batch of one step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.nan if x[0, 0] == 100.0 else 1.0)


def poisoned(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(step * 6 + micro_batch))
    if (step, micro_batch) == (2, 4):
        x[0, 0] = 100.0
    return x, torch.arange(4)


class Noisy(models.Rows):
    """Rows with noise that a function draws."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self._draw = draw

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + self._draw(), y


OWN = torch.Generator()

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "ragged batch": ({"batch_size": 26}, "26 samples cannot be cut into micro-batches of 4: choose a multiple of it, such as 24 or 28"),
    "ragged grains": ({"grains": 4}, "6 micro-batches cannot be cut into 4 grains of equal size: choose a divisor of 6, such as 6"),
    "no samples": ({"batch_size": 0}, "must be at least 1"),
    "generator": ({"data": (i for i in range(3))}, "a generator can be read only once, so a lost step .* Pass a map-style dataset"),
    "empty": ({"data": []}, "the dataset is empty"),
    "no data": ({"data": 7}, "not int"),
    "clip": ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be above 0"),
    "not a model": ({"model": "gpt"}, "model must be an nn.Module or a list of them"),
    "frozen": ({"model": nn.Linear(2, 2).requires_grad_(False)}, "no trainable parameter"),
    "complex": (
        {"model": [nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 7, dtype=torch.complex64))]},
        r"parameter 0\.1\.weight is torch\.complex64 on cpu; only float32, float64, bfloat16, float16 on cpu can be trained",
    ),
    "optimizers": (
        {"optimizer": lambda parameters: [torch.optim.SGD(parameters[:1]), torch.optim.SGD(parameters[1:])]},
        "optimizer is a list, but a Trainer has one optimizer: give one with several parameter groups",
    ),
    "listed optimizers": ({"optimizer": [torch.optim.SGD([nn.Parameter(torch.ones(1))])]}, "optimizer is a list"),
    "optimizer's name": ({"optimizer": "adam"}, r"optimizer is a str: give a torch\.optim\.Optimizer"),
    "closure": ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
    "foreign scheduler": (
        {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), 1)},
        "scheduler belongs to another optimizer",
    ),
    "number across": ({"model": [nn.Linear(48, 48), Number(), models.Head()]}, r"layer 1 \(Number\) gave a float, which cannot cross"),
    "own generator": ({"data": Noisy(lambda: torch.randn(1, generator=OWN))}, "first micro-batch was loaded twice, and its values differ"),
    "function that draws": ({"data": lambda step, micro: (torch.randn(4, 48), torch.arange(4))}, "depend on these alone"),
    "vector loss": ({"loss": lambda output, batch: output.sum(1)}, r"the loss of step 0, micro-batch 0 is \(4,\): return a scalar"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_trained_is_refused_with_advice(lone_job, name: str) -> None:
    options, message = REFUSALS[name]
    with pytest.raises(TrainerError, match=message):
        make(**options)


def test_outside_of_a_job_a_trainer_says_so() -> None:
    with pytest.raises(NotInJob, match=r"inside the train_fn that elastic\.run starts"):
        make()


def test_a_nan_loss_names_step_and_micro_batch_and_applies_nothing(lone_job) -> None:
    layers = [Poison(), nn.Linear(48, 48), models.Head()]
    trainer = make(model=layers, data=poisoned)
    seen = []
    with pytest.raises(NonFinite, match="the loss of step 2, micro-batch 4 is nan: nothing of this step was applied"):
        seen.extend(report.step for report in trainer.run(5))
    assert seen == [0, 1]
    assert all(parameter.isfinite().all() for layer in layers for parameter in layer.parameters())


def train_poisoned(job: Any) -> None:
    list(make(model=[Poison(), nn.Linear(48, 48), models.Head()], data=poisoned).run(5))


@pytest.mark.slow
def test_a_nan_loss_is_raised_on_every_layout() -> None:
    with pytest.raises(harness.WorkerError, match="step 2, micro-batch 4 is nan"):
        harness.run(train_poisoned, workers=3, stages=2)


def skip_poisoned(job: Any, dead_at: int | None = None, model: list[nn.Module] | None = None) -> dict[str, Any] | None:
    """Steps 2 and 4 cannot be applied: a NaN in one micro-batch, and losses that weigh nothing. Worker `dead_at` dies in step 4's body."""
    torch.manual_seed(3)
    layers = [Poison(), nn.Linear(48, 48), models.Head()] if model is None else model
    trainer = make(
        model=layers,
        data=poisoned,
        loss=weightless_in_step_4,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        on_nonfinite="skip",
    )
    trainer.after_step(shrink)
    trainer.average(0.9)
    seen = []
    for report in trainer.run(7):
        seen.append([report.step, report.loss if report.skipped is None else report.skipped])
        if (job.worker, report.step) == (dead_at, 4):
            os.kill(os.getpid(), signal.SIGKILL)
    digest, mean = trainer.digest(), trainer.state_dict("average")
    return {"seen": seen, "digest": digest, "mean": {name: each.tolist() for name, each in mean.items()}} if trainer.leader else None


def shrink(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    parameter.mul_(0.99)


def weightless_in_step_4(output: torch.Tensor, batch: Any) -> tuple[torch.Tensor, float]:
    losses = nn.functional.cross_entropy(output, batch[1], reduction="none")
    weight = 0.0 if float(batch[0][0, 1]) in FIRSTS_OF_STEP_4 else float(len(losses))
    return losses.sum() * (weight > 0), weight


FIRSTS_OF_STEP_4 = {float(poisoned(4, micro_batch)[0][0, 1]) for micro_batch in range(6)}


def plain_skipping() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A plain loop that skips `optimizer.step()`; returns the parameters and their average."""
    torch.manual_seed(3)
    model = nn.Sequential(Poison(), nn.Linear(48, 48), models.Head())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    means: list[torch.Tensor] = []
    for step in range(7):
        optimizer.zero_grad()
        for micro_batch in range(6):
            x, y = poisoned(step, micro_batch)
            nn.functional.cross_entropy(model(x), y, reduction="sum").div(24).backward()
        if step not in (2, 4):
            optimizer.step()
            with torch.no_grad():
                own = [parameter.mul_(0.99).clone() for parameter in model.parameters()]
            means = [0.9 * mean + 0.1 * value for mean, value in zip(means or own, own, strict=True)]
    return [parameter.detach() for parameter in model.parameters()], means


def test_a_step_that_cannot_be_applied_is_skipped_where_that_is_wanted(lone_job) -> None:
    torch.manual_seed(3)
    layers = [Poison(), nn.Linear(48, 48), models.Head()]
    found = skip_poisoned(lone_job, model=layers)
    own = [parameter.detach() for layer in layers for parameter in layer.parameters()]
    assert found is not None
    torch.testing.assert_close((own, [torch.tensor(mean) for mean in found["mean"].values()]), plain_skipping())
    assert [step for step, _ in found["seen"]] == list(range(7))
    reasons = {step: said for step, said in found["seen"] if isinstance(said, str)}
    assert [said["step"] for said in lone_job.sent if said["type"] == "skipped"] == [2, 4]
    assert reasons == {
        2: "the loss of step 2, micro-batch 4 is nan: nothing of this step was applied",
        4: "the weights of the loss of step 4 add up to 0.0: nothing of this step was applied",
    }
    with pytest.raises(TrainerError, match="on_nonfinite='drop'"):
        make(on_nonfinite="drop")


@pytest.mark.long
@pytest.mark.slow
def test_skipped_steps_change_no_bit_on_any_layout_and_are_counted(leftovers) -> None:
    (whole,) = [elastic.run(skip_poisoned, workers=1)]
    assert whole.skipped == (2, 4)
    result = elastic.run(skip_poisoned, args=[1], workers=3, stages=2, rebalance=False)
    assert result.value == whole.value
    assert result.skipped == (2, 4)
    assert [incident["kind"] for incident in result.incidents][:1] == ["death"]


def test_data_may_draw_from_keyed_generators(lone_job) -> None:
    keyed = make(data=Noisy(lambda: torch.randn(1) + random.random()))
    assert [report.step for report in keyed.run(2)] == [0, 1]


def test_data_that_differ_each_time_are_allowed_if_they_need_not_be_exact(lone_job) -> None:
    trainer = make(data=Noisy(lambda: torch.randn(1, generator=OWN)), exact=False)
    assert [report.step for report in trainer.run(2)] == [0, 1]


def test_an_infinite_gradient_is_refused_though_the_loss_is_finite(lone_job) -> None:
    def spiky(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return (output - output.detach()).abs().sqrt().sum()  # 0, with an infinite slope

    with pytest.raises(NonFinite, match="the gradient of step 0 is not finite, though its loss is"):
        list(make(loss=spiky).run(1))


def test_weights_that_add_up_to_nothing_are_refused(lone_job) -> None:
    with pytest.raises(NonFinite, match=r"weights of the loss of step 0 add up to 0\.0"):
        list(make(loss=lambda output, batch: (output.sum(), 0.0)).run(1))


def test_reports_say_what_was_done(lone_job) -> None:
    trainer = make(optimizer=models.two_groups, scheduler=models.cosine)
    reports = list(trainer.run(3))
    assert [report.step for report in reports] == [0, 1, 2]
    assert reports[0].lr == 3e-3 > reports[1].lr
    assert {report.layout for report in reports} == {"[0-1]x1"}
    assert all(report.samples_per_second > 0 and report.tokens_per_second == 0 and report.leader for report in reports)
    assert list(trainer.run(3)) == []
    assert trainer.step == 3
    assert trainer.schedule.split()[:4] == ["0F0", "0B0", "0F1", "0B1"]


def test_tokens_are_counted_where_the_input_is_ids(lone_job) -> None:
    def ids(step: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(40).view(4, 10), torch.arange(4)

    model = nn.Sequential(nn.Embedding(40, 48), nn.AdaptiveAvgPool2d((1, 48)), nn.Flatten(), models.Head())
    (report,) = make(model=model, data=ids).run(1)
    assert report.tokens_per_second / report.samples_per_second == pytest.approx(10)


def test_evaluation_is_in_evaluation_mode_and_leaves_training_alone(lone_job) -> None:
    def losses(evaluate: bool) -> tuple[list[float], list[float]]:
        torch.manual_seed(1)
        trainer = make(model=models.blocks())
        trained, evaluated = [], []
        for report in trainer.run(3):
            trained.append(report.loss)
            if evaluate:
                evaluated += [trainer.evaluate(models.Rows()), trainer.evaluate(models.Rows(), micro_batches=2)]
        return trained, evaluated

    trained, evaluated = losses(evaluate=True)
    assert trained == losses(evaluate=False)[0]
    assert evaluated[0] > evaluated[2] > evaluated[4]
    assert evaluated[0] != evaluated[1]


def evaluate(job: Any) -> list[float]:
    torch.manual_seed(1)
    trainer = make(model=models.blocks())
    return [trainer.evaluate(models.Rows()) for _ in trainer.run(3)]


@pytest.mark.slow
def test_evaluation_gives_the_same_bits_on_every_layout_and_worker() -> None:
    (alone,) = harness.run(evaluate, workers=1)
    assert len(set(alone)) == 3
    for workers, stages in [(2, 2), (5, 3), (3, 1)]:
        assert harness.run(evaluate, workers=workers, stages=stages) == [alone] * workers


def test_evaluating_nothing_is_refused(lone_job) -> None:
    with pytest.raises(TrainerError, match="nothing to evaluate"):
        make().evaluate([])


class Encoding(UserDict):
    """A mapping that is no dict, as the BatchEncoding of transformers is."""


class Output(OrderedDict):
    def __init__(self, **parts: Any) -> None:
        super().__init__(parts)
        self.__dict__.update(parts)


class Whole(nn.Module):
    """Called as models of transformers are: by keyword, with an output whose parts are attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> Output:
        assert mask is not None
        return Output(logits=ids * self.weight * mask * scale, hidden=None)


@pytest.mark.parametrize("made", [dict, Encoding])
def test_a_dict_batch_goes_by_keyword_and_an_output_stays_what_it_is(lone_job, made) -> None:
    def loss(output: Any, batch: Any) -> torch.Tensor:
        assert type(output) is Output
        assert output.hidden is None
        return (output.logits - batch["ids"]).square().mean() + output["logits"].mean()

    def data(step: int, micro_batch: int) -> Any:
        return made({"ids": torch.full((2, 3), step + 1.0), "mask": torch.ones(2, 3)})

    reports = list(make(model=Whole(), data=data, loss=loss).run(2))
    assert [report.loss for report in reports] == [1.0, pytest.approx(2.0, abs=0.1)]
