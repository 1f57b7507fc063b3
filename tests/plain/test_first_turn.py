"""Tests of the first turn of a loop over epochs, in whose loop a worker joins, or continues from a checkpoint, when it is long over."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import elastic
from elastic.worker.job import Job
from tests.plain import loops
from tests.recovery import forks
from tests.recovery.forks import die, when
from tests.recovery.outliving import Fate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_layer")]


class Stopper:
    """Early stopping: done after three values that are not better."""

    def __init__(self) -> None:
        self.best, self.bad = 99, 0

    def update(self, value: int) -> bool:
        self.best, self.bad = min(self.best, value), 0 if value < self.best else self.bad + 1
        return self.bad == 3

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


def train(job: Job, folder: str = "", fate: list[Any] | None = None) -> dict[str, Any]:
    """Values become worse from epoch to epoch, so the fourth one is the last; it ends after the fifth step."""
    if fate and job.worker == 0:
        Fate(job, fate).install()
    net, stopper = loops.model(), Stopper()
    optimizer = torch.optim.SGD([each for each in net.parameters() if each.requires_grad], lr=0.5)
    net, optimizer, loader = job.prepare(net, optimizer, loops.Rows(), **loops.SIZES, **({"checkpoint": folder} if folder else {}))
    loader.register_for_checkpointing(stopper)
    for epoch in loader.epochs(9):
        for group in optimizer.param_groups:
            group["lr"] *= 1 if epoch == 0 else 0.5
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if stopper.update(loader.loop.taken):
            break
    return {"best": stopper.best, "rate": optimizer.param_groups[0]["lr"], "digest": loader.digest()}


def calm() -> dict[str, Any]:
    found = forks.run(1, train=train).results[0]
    assert (found["best"], found["rate"]) == (1, 0.5**4)
    return found


def test_code_behind_it_does_not_act_on_the_states_that_others_have() -> None:
    """The worker joins in the fourth epoch, when one more value would be the last."""

    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", 3, die)

    agent = forks.run(2, train=train, prepare=prepare, least=2)
    assert sorted(agent.results) == [0, 2]
    assert list(agent.results.values()) == [calm()] * 2


def test_nor_where_a_job_continues_from_a_checkpoint(tmp_path: Path) -> None:
    def prepare(job: Job) -> None:
        when(job, "forward", 3, lambda: job.deliver({"type": "stop"}))

    forks.run(2, train=partial(train, folder=str(tmp_path)), prepare=prepare)
    assert sorted(path.name for path in tmp_path.glob("step-*"))[-1] == "step-00000004"
    assert forks.run(2, train=partial(train, folder=str(tmp_path))).results[1] == calm()


def outlived(job: Job, fate: list[Any]) -> dict[str, Any]:
    return train(job, fate=fate)


@pytest.mark.long
@pytest.mark.parametrize("phase", ["forward", "ready"])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_settings_of_an_epoch_whose_first_step_all_workers_die_in_are_not_lost(step: int, phase: str) -> None:
    """Steps 2 and 3 are the first ones of their epochs."""
    result = elastic.run(outlived, args=[["enter", step, 1, phase, [0, 1]]], workers=2)
    assert {found["kind"] for found in result.incidents} >= {"death"}
    assert result.value == calm()
