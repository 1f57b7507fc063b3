"""A loop that is left early: what is saved, and what is said where nothing is."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastic
from elastic.checkpoint.directory import found
from elastic.checkpoint.store import LocalStore
from elastic.errors import TrainerError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]


def data(step: int, micro_batch: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step * 1000 + micro_batch))


def square(output: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def train(job: Any, folder: str, how: str) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    trainer = elastic.Trainer(model, square, optimizer, data, batch_size=16, micro_batch_size=4, checkpoint=folder)
    with pytest.raises(TrainerError, match="before the first step"):
        trainer.save()
    losses = []
    if how == "islice":
        losses += [report.loss for report in itertools.islice(trainer.run(10), 4)]
    elif how.startswith("saved"):
        for report in trainer.run(10):
            losses.append(report.loss)
            if report.step == 2:
                die(job, how, 1)
                trainer.save()
                trainer.save()
            elif report.step == 4:
                break
        die(job, how, 0)
        trainer.save()
    else:
        losses += [report.loss for report in trainer.run(8)]
        trainer.save()
    return [losses, trainer.digest()]


def die(job: Any, how: str, worker: int) -> None:
    if how.endswith("deaths") and job.worker == worker:
        os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in found(LocalStore(folder)))


def test_what_is_not_saved_is_said_and_save_saves_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lost = elastic.run(train, workers=2, stages=1, args=[str(tmp_path / "lost"), "islice"])
    assert names(tmp_path / "lost") == []
    assert "the loop was left behind step 3, and the state behind it is not saved" in capfd.readouterr().err
    assert lost.saves.failed == 1
    first = elastic.run(train, workers=2, stages=2, args=[str(tmp_path / "kept"), "saved"])
    assert names(tmp_path / "kept") == ["step-00000003", "step-00000005"]
    assert (first.saves.saved, first.saves.failed) == (2, 0)
    assert "not saved" not in capfd.readouterr().err
    then = elastic.run(train, workers=1, args=[str(tmp_path / "kept"), "whole"])
    whole = elastic.run(train, workers=1, args=[str(tmp_path / "whole"), "whole"])
    assert first.value[0] + then.value[0] == whole.value[0]
    assert then.value[1] == whole.value[1]
    assert names(tmp_path / "whole") == ["step-00000008"]


def test_whoever_dies_it_is_saved(tmp_path: Path) -> None:
    plain = elastic.run(train, workers=2, stages=1, args=[str(tmp_path / "plain"), "saved"])
    died = elastic.run(train, workers=2, stages=2, args=[str(tmp_path / "died"), "saved, with deaths"])
    assert [incident["kind"] for incident in died.incidents].count("death") == 2
    assert names(tmp_path / "died") == names(tmp_path / "plain") == ["step-00000003", "step-00000005"]
    assert died.value[1] == plain.value[1]
