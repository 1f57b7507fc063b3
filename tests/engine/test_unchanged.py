"""Tests that forbidden changes of tensors are reported with layer, module and advice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from test_statistics import Average
from torch import nn

import elastic
from elastic.engine import unchanged as watch
from elastic.engine.model import LayeredModel
from elastic.errors import TrainerError


class Counter(nn.Module):
    def __init__(self, *, persistent: bool = True, from_call: int = 0, data: bool = False) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=persistent)
        self.ran, self.from_call, self.data = 0, from_call, data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ran += 1
        if self.ran > self.from_call:
            (self.calls.data if self.data else self.calls).add_(1)
        return x


class Cache(nn.Module):
    """Makes what it needs when it needs it, and writes what is there already."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(0), persistent=False)
        self.register_buffer("positions", torch.zeros(48), persistent=False)
        self.register_buffer("scale", torch.full((48,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mask.shape != x.shape:
            self.mask = torch.ones(x.shape)
        self.positions.copy_(torch.arange(48.0))
        self.scale.fill_(2.0)
        return x * self.mask * self.scale + self.positions


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 48, max_norm=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(torch.arange(len(x)))


def make(layer: nn.Module, **options: Any) -> elastic.Trainer:
    layers = [nn.Linear(48, 48), layer, models.Head()]
    return elastic.Trainer(layers, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, **options)


IN_FORWARD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(48, 48)),
        r"buffer 1.parametrizations.weight.0._[uv] of layer 1 \(_SpectralNorm\) was changed by the forward of step 0: .* BatchNorm",
    ),
    "a moving average": (Average, r"buffer 1.mean of layer 1 \(Average\) was changed by the forward of step 0"),
    "a counter": (Counter, r"buffer 1.calls of layer 1 \(Counter\) was changed by the forward of step 0"),
    "from later on": (lambda: Counter(from_call=80), r"buffer 1.calls of layer 1 \(Counter\) was changed by the forward of step \d"),
    "not saved": (lambda: Counter(persistent=False), r"buffer 1.calls of layer 1 \(Counter\) was changed by the forward of step 1"),
    "uncounted": (lambda: Counter(data=True), r"buffer 1.calls of layer 1 \(Counter\) was changed by the forward of step [01]"),
    "normalising weights": (
        Words,
        r"parameter 1.table.weight of layer 1 \(Embedding\) was changed in place by the forward of step 0: .*max_norm",
    ),
    "statistics of instances": (
        lambda: nn.Sequential(nn.Unflatten(1, (4, 12)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten()),
        r"buffer 1.1.running_mean of layer 1 \(InstanceNorm1d\) was changed by the forward of step 0",
    ),
}


@pytest.mark.parametrize("name", IN_FORWARD)
def test_what_a_forward_changes_is_refused_before_a_step_counts(lone_job: Any, name: str) -> None:
    build, message = IN_FORWARD[name]
    with pytest.raises(TrainerError, match=message):
        list(make(build()).run(20))


def test_caches_are_not_state(lone_job: Any) -> None:
    assert len(list(make(Cache()).run(3))) == 3


def test_without_exactness_it_is_a_warning_but_for_parameters(lone_job: Any) -> None:
    with pytest.warns(UserWarning, match="buffer 1.calls of layer 1 .*exact=False") as warned:
        assert len(list(make(Counter(), exact=False).run(3))) == 3
    assert len(warned) == 1
    with pytest.raises(TrainerError, match=r"parameter 1\.table\.weight"):
        list(make(Words(), exact=False).run(3))


class Drifting(nn.Module):
    """Changes a frozen parameter when it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(48), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scale.data.mul_(0.99)
        return x * self.scale


@pytest.mark.parametrize("exact", [True, False])
def test_frozen_parameters_never_change(lone_job: Any, exact: bool) -> None:
    """Their copies count as those of every step, so a change would be lost, or taken for damage, whether exactness is asked for or not."""
    message = r"frozen parameter 1\.scale of layer 1 \(Drifting\) was changed by the forward of step [01]: .* in a buffer"
    with pytest.raises(TrainerError, match=message):
        list(make(Drifting(), exact=exact).run(3))
    with pytest.raises(TrainerError, match=r"frozen parameter 1\.teacher\.bias of layer 1 .*between two steps, before step 1"):  # noqa: PT012
        layer = Teacher()
        for _ in make(layer, exact=exact).run(3):
            layer.teacher.bias.data.mul_(0.9)


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(48, 48)
        self.teacher = nn.Linear(48, 48).requires_grad_(False)
        self.norm = nn.BatchNorm1d(48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.own(x)) - self.teacher(x)


IN_LOOP: dict[str, tuple[Callable[[Teacher], object], str]] = {
    "a teacher": (
        lambda m: m.teacher.weight.mul_(0.9),
        r"frozen parameter 1.teacher.weight of layer 1 \(Linear\) was changed between two steps",
    ),
    "a teacher, uncounted": (
        lambda m: m.teacher.bias.data.mul_(0.9),
        r"frozen parameter 1.teacher.bias of layer 1 \(Linear\) was changed between",
    ),
    "statistics": (
        lambda m: m.norm.reset_running_stats(),
        r"buffer 1.norm.running_\w+ of layer 1 \(BatchNorm1d\), a running statistic, .* evaluation without model.eval\(\): call it",
    ),
}


@pytest.mark.parametrize("name", IN_LOOP)
def test_what_the_loop_changes_is_refused_with_advice(lone_job: Any, name: str) -> None:
    act, message = IN_LOOP[name]
    layer = Teacher()
    with pytest.raises(TrainerError, match=message + ".* keep what changes outside of the model"):  # noqa: PT012
        for report in make(layer).run(6):
            if report.step >= 2:
                act(layer)


def test_a_teacher_that_stays_as_it_is_and_is_restored_is_fine(lone_job: Any) -> None:
    assert len(list(make(Teacher()).run(3))) == 3


def test_buffers_of_the_list_of_layers_itself_are_fine(lone_job: Any) -> None:
    model = nn.Sequential(nn.Linear(48, 48), models.Head())
    model.register_buffer("made_of", torch.ones(3))
    for exact in (True, False):
        trainer = elastic.Trainer(model, models.cross_entropy, models.adamw, models.Rows(), batch_size=24, micro_batch_size=4, exact=exact)
        assert len(list(trainer.run(2))) == 2


def test_all_parts_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PART_BYTES", 100)
    model = LayeredModel([nn.Linear(4, 4), *(nn.Linear(4, 4).requires_grad_(False) for _ in range(5))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(10):
            model.watch.begin(step)
        model.root.get_parameter("3.weight").data.add_(1)
        with pytest.raises(TrainerError, match=r"frozen parameter 3.weight of layer 3"):  # noqa: PT012
            for step in range(10, 20):
                model.watch.begin(step)
