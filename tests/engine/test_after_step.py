"""Tests changes to parameters after each update, what a loop body must not do, and whole tensors."""

from __future__ import annotations

from typing import Any

import harness
import models
import pytest
import torch
from torch import nn

import elastic
from elastic.engine import after_step as after
from elastic.errors import TrainerError


def clamped(parameter: torch.Tensor, state: dict[str, Any]) -> None:
    parameter.clamp_(-0.05, 0.05)


def make(**options: Any) -> tuple[elastic.Trainer, nn.Sequential]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(48, 300), nn.Tanh(), nn.Linear(300, 48), models.Head())
    data = models.Rows()
    trainer = elastic.Trainer(model, models.cross_entropy, models.adamw, data, batch_size=24, micro_batch_size=4, seed=11, **options)
    trainer.after_step(clamped)
    trainer.average(0.9)
    return trainer, model


def train(job: Any) -> tuple[str | None, dict[str, list[float]]]:
    trainer, _ = make()
    for _ in trainer.run(4):
        pass
    mean = trainer.state_dict("average")
    return trainer.digest(), {name: tensor.flatten().tolist() for name, tensor in mean.items()}


def test_it_is_a_part_of_the_step_as_in_a_plain_loop(lone_job) -> None:
    trainer, model = make()
    means: dict[str, torch.Tensor] = {}
    for _ in trainer.run(3):
        for name, parameter in model.named_parameters():
            assert parameter.abs().max() <= 0.05
            value = parameter.detach().clone()
            means[name] = value if name not in means else means[name].mul_(0.9).add_(value, alpha=0.1)
    found = trainer.state_dict("average")
    assert found.keys() == model.state_dict().keys()
    for name, mean in means.items():
        torch.testing.assert_close(found[name], mean, rtol=1e-6, atol=0)
    assert all(torch.equal(value, trainer.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(TrainerError, match="no parameter has a state 'mean'"):
        trainer.state_dict("mean")
    with pytest.raises(TrainerError, match="give it before the first one"):
        trainer.after_step(clamped)


@pytest.mark.slow
def test_it_has_the_same_bits_on_every_layout() -> None:
    ((digest, mean),) = harness.run(train, workers=1)
    for workers, stages in ((2, 1), (3, 2)):
        found = harness.run(train, workers=workers, stages=stages)
        assert found[0] == (digest, mean)
        assert [each[1] for each in found] == [mean] * workers


@pytest.mark.parametrize(
    ("f", "why"),
    [
        (lambda p, state: p.div_(p.norm()), "is not elementwise"),
        (lambda p, state: p.add_(torch.randn_like(p)), "draws random numbers"),
        (lambda p, state: state.update(rows=torch.zeros(3)), "does not have the shape"),
        (lambda p, state: state.update(name="x"), "a str: keep tensors"),
    ],
)
def test_what_depends_on_the_layout_is_refused(f: after.AfterStep, why: str) -> None:
    with pytest.raises(TrainerError, match=why):
        after.check(f, torch.float32, "block")
    after.check(clamped, torch.bfloat16, "block")


def _zeroed(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.zero_()  # pyright: ignore[reportIndexIssue]


def _replaced(model: nn.Module) -> None:
    model[0].weight.data = torch.zeros_like(model[0].weight)  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (_zeroed, r"step 1, or code behind it, changed parameter 0\.weight in place: .* after_step\(f\) of the Trainer"),
        (_replaced, r"step 1, or code behind it, changed parameter 0\.weight in place"),
        (lambda model: model.requires_grad_(False), r"step 1, or code behind it, changed requires_grad of parameter 0\.weight"),
    ],
)
def test_a_loop_body_that_changes_parameters_is_refused(lone_job, body: Any, why: str) -> None:
    trainer, model = make()

    def loop() -> None:
        for report in trainer.run(4):
            if report.step == 1:
                body(model)

    with pytest.raises(TrainerError, match=why):
        loop()


def unequal(job: Any) -> None:
    trainer, _ = make()
    optimizer = trainer._optimizer.optimizer
    for report in trainer.run(4):
        if report.leader and report.step == 1:
            optimizer.param_groups[0]["lr"] *= 0.5


def partial(job: Any) -> None:
    trainer, model = make()
    for _ in trainer.run(1):
        model.state_dict()


@pytest.mark.slow
def test_settings_that_differ_between_workers_stop_the_job() -> None:
    with pytest.raises(harness.WorkerError, match=r"step 2 cannot be taken: lr of parameter group 0 is .* on worker 0 and .* on worker 1"):
        harness.run(unequal, workers=2, stages=1)
    with pytest.raises(harness.WorkerError, match=r"state_dict\(\) was called on layers that are not on this worker"):
        harness.run(partial, workers=2, stages=2)


def _exchanged(model: nn.Module) -> None:
    model[0] = nn.Linear(48, 300)  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_zeroed, r"step 1, or code behind it, changed parameter 0\.weight in place: .* after_step\(f\) of the Trainer"),
        (lambda model: model.requires_grad_(False), r"changed requires_grad of parameter 0\.weight.*or to train it later"),
        (_exchanged, r"parameter 0\.(weight|bias) of the model was replaced, .* after step 1: .* with all layers before it"),
    ],
)
@pytest.mark.parametrize("digests", [False, True])
def test_a_change_of_parameters_between_loops_is_refused(lone_job, change: Any, why: str, digests: bool) -> None:
    trainer, model = make()
    assert [report.step for report in trainer.run(2)] == [0, 1]
    change(model)
    if digests:
        trainer.digest()
    with pytest.raises(TrainerError, match=why):
        next(iter(trainer.run(4)))


def test_what_the_model_becomes_after_its_last_loop_is_not_refused(lone_job) -> None:
    trainer, model = make()
    assert len(list(trainer.run(2))) == 2
    digest = trainer.digest()
    model.requires_grad_(False)
    assert trainer.digest() == digest
