"""Tests that changing torch's process-wide settings during training raises an error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import elastic
from elastic.engine import torch_settings as modes
from elastic.errors import TrainerError


def set_products(value: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(value)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "threads": (lambda: torch.set_num_threads(2), lambda: torch.set_num_threads(1)),
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
    "deterministic algorithms": (lambda: torch.use_deterministic_algorithms(True), lambda: torch.use_deterministic_algorithms(False)),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.set_autocast_enabled("cpu", False)),
    "denormals flushed": (lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)),
    "oneDNN": (lambda: torch._C._set_mkldnn_enabled(False), lambda: torch._C._set_mkldnn_enabled(True)),
    "NNPACK": (lambda: torch._C._set_nnpack_enabled(False), lambda: torch._C._set_nnpack_enabled(True)),
    "float32 products": (lambda: set_products("medium"), lambda: set_products("highest")),
    "attention kernels": (lambda: torch.backends.cuda.enable_flash_sdp(False), lambda: torch.backends.cuda.enable_flash_sdp(True)),
    "cuDNN": (lambda: torch._C._set_cudnn_benchmark(True), lambda: torch._C._set_cudnn_benchmark(False)),
}


def trainer(layer: nn.Module | None = None) -> elastic.Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), layer or nn.Identity())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return elastic.Trainer(model, lambda output, _: output.pow(2).mean(), optimizer, batch, batch_size=8, micro_batch_size=4)


def batch(step: int, micro_batch: int) -> torch.Tensor:
    return torch.full((4, 4), float(step + micro_batch))


@pytest.mark.usefixtures("lone_job")
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_the_loop_changes_is_named_before_the_next_step(name: str) -> None:
    change, back = CHANGES[name]
    run = trainer().run(5)
    next(run)
    step = "before step [12]"  # the step after those that were computed already
    change()
    try:
        with pytest.raises(TrainerError, match=rf"{step}, torch's setting of {re.escape(name)} was changed from"):
            list(run)
    finally:
        back()


class Greedy(nn.Module):
    """As a layer that calls a library that calls torch.set_num_threads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 12:
            torch.set_num_threads(3)
        return values


def test_what_a_layer_changes_is_named_before_its_step_counts(lone_job: Any) -> None:
    steps = []
    assert not hasattr(lone_job, "error")
    with pytest.raises(TrainerError, match=r"while step \d+ was computed, torch's setting of threads was changed from 1 to 3"):
        steps += [report.step for report in trainer(Greedy()).run(50)]
    assert len(steps) < 12
    assert isinstance(lone_job.error, TrainerError), "the job hears of it, should the loop swallow it"


@pytest.mark.usefixtures("lone_job")
def test_threads_that_the_job_was_not_started_with_are_refused() -> None:
    torch.set_num_threads(2)
    with pytest.raises(TrainerError, match=r"computes with 2 threads here.*started with threads=1;.*pass threads= to elastic.run"):
        trainer()


@pytest.mark.usefixtures("lone_job")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_steps_are_taken_with_gradients_whatever_surrounds_them(context: Callable[[], Any]) -> None:
    surrounded = trainer()
    with context():
        losses = [report.loss for report in surrounded.run(3)]
    assert losses == [report.loss for report in trainer().run(3)]


def test_every_setting_has_advice_and_none_is_read_slowly() -> None:
    assert modes.modes().keys() == modes._MEANS.keys()
    assert set(CHANGES) | {"float32 convolutions"} == modes._MEANS.keys()
