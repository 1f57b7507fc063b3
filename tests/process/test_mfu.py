"""A job tells the share of its devices' peak that its model uses: in reports, the record of steps, the page and `elastic top`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import elastic
from elastic.observe.journal import LinesReader
from tests.conftest import Leftovers

BATCH, MICRO_BATCH, INPUT, WIDTH, CLASSES = 64, 16, 128, 256, 8
FLOPS = 2 * BATCH * (2 * INPUT * WIDTH + 3 * WIDTH * WIDTH + 3 * WIDTH * CLASSES)
"""Of a step: forward and the gradients of parameters; but for the first layer also those of inputs."""


def made() -> tuple[nn.Sequential, TensorDataset]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(INPUT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    return model, TensorDataset(torch.randn(512, INPUT), torch.randint(0, CLASSES, (512,)))


def by_trainer(job: Any) -> list[float | None]:
    model, data = made()
    loss = lambda output, batch: functional.cross_entropy(output, batch[1])  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = elastic.Trainer(model, loss, optimizer, data, batch_size=BATCH, micro_batch_size=MICRO_BATCH)
    return [report.mfu for report in trainer.run(steps=4)]


def by_loop(job: Any) -> list[float | None]:
    model, data = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = job.prepare(model, optimizer, data, batch_size=BATCH, micro_batch_size=MICRO_BATCH, steps=4)
    found = []
    for x, y in loader:
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.report is not None:
            found.append(loader.report.mfu)
    return found


@pytest.mark.long
@pytest.mark.parametrize("train", [by_trainer, by_loop])
def test_the_share_of_the_peak_is_told(train: Any, tmp_path: Path, leftovers: Leftovers) -> None:
    directory, page = tmp_path / "run", tmp_path / "run.html"
    result = elastic.run(train, workers=2, directory=directory, report=page, progress=False)
    shares = result.value
    lines = LinesReader(directory / "steps.jsonl").read()
    assert len(shares) == len(lines) == 4
    assert [line["flops"] for line in lines] == [FLOPS] * 4
    assert lines[0]["peak_flops"] > 1e8
    assert shares == [pytest.approx(line["flops"] / line["seconds"] / line["peak_flops"]) for line in lines]
    assert all(0 < share < 1.5 for share in shares), "the peak is one of this machine"
    assert "MFU, over time" in page.read_text()
    live = json.loads((directory / "live.json").read_text())
    assert live["mfu"] == pytest.approx(shares[live["step"]])
