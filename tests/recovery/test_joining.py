"""Tests joins in mid-step if the job may not shrink: the new worker takes part in the step's remaining yields and collectives."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic.comm.rounds import Rounds
from elastic.worker.engine import Engine
from elastic.worker.job import Job
from elastic.worker.trainer import Trainer
from tests.engine import models
from tests.recovery import forks
from tests.recovery.forks import Agent, die

pytestmark = pytest.mark.slow

STEPS = 6


def train(job: Job, folder: str | None = None) -> dict[str, Any]:
    """Uses every collective call: before the loop, in it, in saves, after it; and a second loop that changes the optimizer."""
    torch.manual_seed(5)
    layers = [nn.Sequential(nn.Linear(models.WIDTH, models.WIDTH), nn.Dropout(0.1)) for _ in range(forks.LAYERS)]
    optimizer = torch.optim.AdamW([parameter for layer in layers for parameter in layer.parameters()], lr=3e-3)
    saves = {} if folder is None else {"checkpoint": folder, "every": 2}
    trainer = Trainer(layers, models.cross_entropy, optimizer, models.Rows(), batch_size=8, micro_batch_size=2, **saves)
    told: list[Any] = [["before", trainer.evaluate(models.Rows(), micro_batches=3)]]
    for steps in (3, STEPS):
        for report in trainer.run(steps):
            told.append(["step", report.step, report.loss, report.grad_norm, report.lr])
            if report.step in (1, 4):
                optimizer.param_groups[0]["lr"] *= 0.5
            if report.step % 2:
                told.append(["evaluation", report.step, trainer.evaluate(models.Rows(), micro_batches=3)])
                trainer.digest()
        told.append(["between", steps, trainer.evaluate(models.Rows(), micro_batches=2)])
    return {"told": told, "digest": trainer.digest()}


def dies(job: Job, fates: dict[int, int]) -> None:
    """At its so-manieth moment: phases of steps that it enters, and rounds that it begins and ends."""
    if job.worker not in fates:
        return
    left, enter = [fates[job.worker]], job.enter
    collect, spread = Rounds._collect, Rounds._spread

    def moment() -> None:
        left[0] -= 1
        if left[0] < 0:
            die()

    def entered(phase: str, step: int, micro_batch: int = -1) -> None:
        enter(phase, step, micro_batch)
        moment()

    def collected(self: Rounds, *arguments: Any) -> Any:
        moment()
        found = collect(self, *arguments)
        moment()
        return found

    def spreads(self: Rounds, *arguments: Any) -> Any:
        found = spread(self, *arguments)
        moment()
        return found

    job.enter = entered  # pyright: ignore[reportAttributeAccessIssue]
    Rounds._collect, Rounds._spread = collected, spreads


@cache
def calm() -> dict[str, Any]:
    return forks.run(1, train=train).results[0]


def check(agent: Agent, workers: int) -> None:
    """Checks that every worker got what undisturbed workers get, a joiner from some step on."""
    assert len(agent.results) == workers
    for worker, result in agent.results.items():
        told, expected = result["told"], calm()["told"]
        if worker >= workers:
            seen = [line for line in told if line[0] == "step"]
            first = expected.index(seen[0]) if seen else len(expected)
            expected = [line for line in expected[:first] if line[0] in ("before", "between")] + expected[first:]
        assert told == expected, f"worker {worker}"
    assert agent.view is not None
    assert agent.results[agent.view.coordinator]["digest"] == calm()["digest"]


def joins(workers: int, victim: int, moment: int, folder: Path | None = None) -> None:
    """The victim dies at that moment, and the job may not shrink."""
    own = train if folder is None else partial(train, folder=str(folder))
    agent = forks.run(workers, train=own, least=workers, prepare=partial(dies, fates={victim: moment}))
    assert agent.started == workers + 1, "it did not die"
    check(agent, workers)


MOMENTS = [(2, 1, 20), (2, 1, 48), (2, 1, 77), (2, 1, 105), (2, 1, 133), (2, 0, 36), (2, 0, 122), (3, 1, 98)]


@pytest.mark.parametrize(("workers", "victim", "moment"), MOMENTS)
def test_a_joiner_takes_part_in_all_that_is_still_done_together(workers: int, victim: int, moment: int) -> None:
    """Before the loop, in steps and loop bodies, between two loops, and after them."""
    joins(workers, victim, moment)


@pytest.mark.parametrize("moment", [80, 130, 166])
def test_and_in_saves(moment: int, tmp_path: Path) -> None:
    joins(2, 1, moment, tmp_path)


def dies_in_a_save(job: Job, victim: int, gathered: int) -> None:
    """Before or after its so-manieth exchange of a save."""
    if job.worker != victim:
        return
    left, gather = [gathered], Engine.gather

    def moment() -> None:
        left[0] -= 1
        if left[0] < 0:
            die()

    def gathers(self: Engine, value: dict[str, Any]) -> list[dict[str, Any]]:
        moment()
        found = gather(self, value)
        moment()
        return found

    Engine.gather = gathers


@pytest.mark.parametrize(("victim", "gathered"), [(1, 0), (1, 1), (1, 2), (1, 3), (0, 0), (0, 2), (1, 4), (0, 5)])
def test_a_joiner_does_not_miss_a_save_that_survivors_have_begun(victim: int, gathered: int, tmp_path: Path) -> None:
    """Survivors are in the save before a step that the joiner computes."""
    agent = forks.run(
        2, train=partial(train, folder=str(tmp_path)), least=2, prepare=partial(dies_in_a_save, victim=victim, gathered=gathered)
    )
    assert agent.started == 3, "it did not die"
    check(agent, 2)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", range(13, 136, 6))
def test_wherever_the_other_one_dies(victim: int, moment: int) -> None:
    joins(2, victim, moment)
