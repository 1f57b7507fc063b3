"""Tests loops that are left early: what is saved, and the message if nothing is."""

from __future__ import annotations

import itertools
import os
import shutil
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
    elif how.startswith("left"):
        for report in trainer.run(10):
            losses.append(report.loss)
            if report.step == 4 - ("apart" in how and job.worker == 1):
                break
        if "apart" in how:
            return []
        die(job, how, 1)
        trainer.statistics()  # so that they do not die at once
        behind: Any = trainer._steps
        behind._save_now = lambda save=behind._save_now: die(job, how, 0) or save()
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, elastic.JobResult]:
    """A job that saved after its third step and after its fifth, the last."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, elastic.run(train, workers=2, stages=2, args=[str(folder), "saved"])


@pytest.mark.long
def test_the_last_step_is_saved_and_save_saves_at_once(tmp_path: Path, undisturbed: tuple[Path, elastic.JobResult]) -> None:
    left = elastic.run(train, workers=2, stages=1, args=[str(tmp_path / "left"), "islice"])
    assert names(tmp_path / "left") == ["step-00000004"]
    assert (left.saves.saved, left.saves.failed) == (1, 0)
    kept, first = undisturbed
    assert names(kept) == ["step-00000003", "step-00000005"]
    assert (first.saves.saved, first.saves.failed) == (2, 0)
    shutil.copytree(kept, tmp_path / "kept")
    then = elastic.run(train, workers=1, args=[str(tmp_path / "kept"), "whole"])
    whole = elastic.run(train, workers=1, args=[str(tmp_path / "whole"), "whole"])
    last = elastic.run(train, workers=2, stages=2, args=[str(tmp_path / "left"), "whole"])
    assert first.value[0] + then.value[0] == left.value[0] + last.value[0] == whole.value[0]
    assert then.value[1] == last.value[1] == whole.value[1]
    assert names(tmp_path / "whole") == ["step-00000008"]


def test_whoever_dies_it_is_saved(tmp_path: Path, undisturbed: tuple[Path, elastic.JobResult]) -> None:
    died = elastic.run(train, workers=2, stages=2, args=[str(tmp_path / "died"), "saved, with deaths"])
    assert [incident["kind"] for incident in died.incidents].count("death") == 2
    assert names(tmp_path / "died") == ["step-00000003", "step-00000005"]
    assert died.value[1] == undisturbed[1].value[1]


@pytest.mark.long
def test_whoever_dies_behind_a_loop_that_was_left_its_last_step_is_saved(
    tmp_path: Path, undisturbed: tuple[Path, elastic.JobResult]
) -> None:
    died = elastic.run(train, workers=3, stages=2, args=[str(tmp_path / "died"), "left, with deaths"])
    assert sorted(worker for each in died.incidents for worker in (each["worker"], *each["also"])) == [0, 1]
    assert names(tmp_path / "died") == ["step-00000005"]
    assert died.value[1] == undisturbed[1].value[1]


@pytest.mark.long
def test_a_loop_that_is_left_behind_different_steps_ends_the_job(tmp_path: Path) -> None:
    said = "worker 1 has left the loop after step 3 and returned from train_fn, and worker 0 has gone on to step 4. A loop must be left"
    with pytest.raises(TrainerError, match=said):
        elastic.run(train, workers=2, stages=1, args=[str(tmp_path / "apart"), "left apart"])
    assert names(tmp_path / "apart") == []
