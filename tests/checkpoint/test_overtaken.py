"""Tests that warnings about saves skipped during an unfinished save are rate-limited."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastic
from elastic.worker.rate_limited import Rarely


def test_the_first_is_said_and_then_one_in_so_many_seconds_with_how_many_there_were() -> None:
    rarely = Rarely(10.0)
    assert [rarely.due(float(now)) for now in (100, 101, 105, 109)] == [0, None, None, None]
    assert [rarely.due(float(now)) for now in (110, 111, 131)] == [3, None, 1]


def train(job: Any, directory: str, steps: int) -> None:
    os.fsync = lambda _: time.sleep(0.1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    batch = lambda step, micro_batch: torch.ones(4, 8)  # noqa: E731
    options: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "checkpoint": directory, "every": 1}
    trainer = elastic.Trainer(model, lambda o, b: o.square().mean(), torch.optim.SGD(model.parameters()), batch, **options)
    for _ in trainer.run(steps):
        pass


@pytest.mark.long
@pytest.mark.slow
def test_a_job_whose_saves_take_longer_than_its_steps_says_so_rarely(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    result = elastic.run(train, workers=1, args=[str(tmp_path / "run"), 40])
    lines = [line for line in capfd.readouterr().err.splitlines() if "is not saved: the previous save has not finished" in line]
    assert result.saves.failed >= 5
    assert 1 <= len(lines) <= 1 + (time.monotonic() - began) / 10.0
    assert result.saves.newest == 40
