"""Tests a worker's history of its last two steps: enough to undo one, and for another worker to continue from either."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from elastic.engine.decision import Apply
from elastic.errors import TrainerError
from elastic.recovery.inventory import Progress
from elastic.worker import history as histories
from elastic.worker.history import History
from elastic.worker.layer_attributes import Attributes
from elastic.worker.loopsettings import same
from tests import dynamo  # noqa: F401


def answer(step: int) -> Apply:
    return Apply(step=step, loss=step / 2, denominator=4.0, norm=1.0, clip=1.0, tokens=0, stop=False, pause=False, again=False)


class Trained:
    """A worker's optimizer, its scheduler and its history."""

    def __init__(self, scheduler: Any = None) -> None:
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.5)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.5) if scheduler is None else scheduler
        settings = lambda: [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]  # noqa: E731
        self.layer = nn.Dropout(0.5)
        optimizer: Any = SimpleNamespace(optimizer=self.optimizer, settings=settings)
        self.history = History(optimizer, self.scheduler, Attributes(self.layer))

    def step(self, step: int, *, again: bool = False) -> None:
        self.history.save()
        self.optimizer.step()
        self.scheduler.step()
        self.history.applied(answer(step), again=again)

    @contextmanager
    def body(self) -> Iterator[dict[str, Any]]:
        """A loop body, given the first group."""
        self.history.entering()
        yield self.optimizer.param_groups[0]
        self.history.left()

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def resume(self, step: int, progress: Progress | None = None, seen: int = -1) -> None:
        self.history.note()
        travelled = None if progress is None else Progress.from_json(json.loads(json.dumps(progress.to_json())))
        self.history.resume(SimpleNamespace(resume=step, progress=travelled), seen)  # pyright: ignore[reportArgumentType]


def trained(steps: int, scheduler: Any = None) -> Trained:
    found = Trained(scheduler)
    for step in range(steps):
        found.step(step)
    return found


def test_the_last_two_steps_are_remembered() -> None:
    worker = trained(4)
    history = worker.history
    assert history.step == 3
    assert [history.answer(step) for step in (1, 2, 3)] == [None, answer(2), answer(3)]


def test_progress_is_of_both_steps() -> None:
    progress = trained(3).history.progress()
    assert progress.keys() == {1, 2}
    for step, lr in ((1, 0.25), (2, 0.125)):
        assert progress[step].apply["loss"] == step / 2
        assert ["lr", lr] in progress[step].groups[0]["dict"]
        assert ["last_epoch", step + 1] in progress[step].scheduler["dict"]
        assert Progress.from_json(json.loads(json.dumps(progress[step].to_json()))) == progress[step]


def test_before_the_first_step_there_is_none_and_after_it_one() -> None:
    assert trained(0).history.progress() == {}
    assert trained(1).history.progress().keys() == {0}


def test_settings_changed_in_the_loop_body_belong_to_the_step_before() -> None:
    worker = trained(2)
    with worker.body() as group:
        group["momentum"] = 0.9
    worker.step(2)
    with worker.body() as group:
        group["momentum"] = 0.8
    progress = worker.history.progress()
    assert [dict(progress[step].groups[0]["dict"])["momentum"] for step in (1, 2)] == [0.9, 0.9], "of the newest from before its body"
    assert [progress[step].body for step in (1, 2)] == [True, False]


def test_a_step_taken_again_has_its_settings_and_what_its_body_set_is_put_back() -> None:
    worker = trained(2)
    with worker.body() as group:
        group["momentum"], worker.layer.p, group["note"] = 0.9, 0.25, (1, "x")
    worker.step(2)
    with worker.body() as group:
        group["lr"], worker.layer.p, worker.layer.extra = 7.0, 0.125, 3
        worker.scheduler.step()
    ahead = worker.history.settings()
    assert worker.lr != 7.0, "the scheduler has set it"
    worker.resume(1)
    assert (worker.lr, worker.layer.p, vars(worker.layer).get("extra")) == (0.25, 0.25, None)
    assert worker.optimizer.param_groups[0]["momentum"] == 0.9
    worker.step(2, again=True)
    assert same(asdict(worker.history.settings()), asdict(ahead))
    assert (worker.layer.p, worker.layer.extra) == (0.125, 3)


def test_a_loss_in_a_loop_body_puts_back_what_it_had_set_so_far() -> None:
    worker = trained(2)
    with worker.body() as group:
        group["momentum"], worker.layer.p = 0.9, 0.25
        worker.resume(0)
        assert (group["momentum"], worker.layer.p) == (0.5, 0.5)
        worker.step(1, again=True)
        assert (group["momentum"], worker.layer.p) == (0.9, 0.25)
        group["momentum"] = 0.8
    worker.step(2)
    assert worker.history.progress()[1].groups != worker.history.progress()[2].groups
    worker.resume(1)
    assert (group["momentum"], worker.layer.p) == (0.8, 0.25)


def test_steps_behind_a_checkpoint_are_taken_again_with_what_each_body_set() -> None:
    worker, joiner = trained(0), trained(0)
    seen = []
    for step in range(5):
        worker.step(step)
        with worker.body() as group:
            group["momentum"] = worker.layer.p = step / 10
        if step == 1:
            saved = worker.history.settings()
        seen.append(worker.history.settings())
    worker.history.note()
    told = json.loads(json.dumps(worker.history.changes()))
    joiner.history.learn([told, told])
    for one in (worker, joiner):
        one.history.note()
        one.history.begin(1, saved)
        for step in range(2, 5):
            one.step(step, again=True)
            assert same(asdict(one.history.settings()), asdict(seen[step]))


def test_what_is_not_known_any_more_is_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories, "_CHANGES_KEPT", 2)
    worker = trained(0)
    for step in range(5):
        worker.step(step)
        with worker.body() as group:
            group["momentum"] = step / 10
    worker.step(5)
    settings = worker.history.settings()
    with pytest.raises(TrainerError, match="after step 1 must be taken again, but the loop body's changes after step 2 are no longer"):
        worker.history.begin(1, settings)
    worker.history.begin(2, settings)


def test_a_joiner_begins_before_or_behind_the_loop_body_of_the_resumed_step() -> None:
    other = trained(3)
    with other.body() as group:
        group["momentum"] = other.layer.p = 0.75
    other.history.note()
    told, progress = other.history.changes(), other.history.progress()[2]
    for seen, momentum, p in ((2, 0.75, 0.75), (1, 0.5, 0.5)):
        joiner = trained(0)
        joiner.history.learn([told])
        joiner.resume(2, progress, seen)
        assert (joiner.optimizer.param_groups[0]["momentum"], joiner.layer.p) == (momentum, p)


def test_going_on_from_where_it_is_changes_nothing() -> None:
    worker = trained(3)
    worker.resume(2, None)
    assert (worker.history.step, worker.lr) == (2, 0.125)
    assert worker.history.progress().keys() == {1, 2}


def test_one_step_is_taken_back_from_own_memory() -> None:
    worker, other = trained(3), trained(2)
    worker.resume(1, None)
    assert (worker.history.step, worker.lr) == (1, other.lr)
    assert worker.scheduler.state_dict() == other.scheduler.state_dict()
    assert worker.history.progress().keys() == {1}
    worker.step(2)
    other.step(2)
    assert worker.lr == other.lr
    assert worker.history.progress() == other.history.progress()


def test_the_first_step_is_taken_back() -> None:
    worker = trained(1)
    worker.resume(-1, None)
    assert (worker.history.step, worker.lr, worker.scheduler.last_epoch) == (-1, 1.0, 0)
    assert worker.history.progress() == {}


def test_a_joiner_goes_on_from_what_others_know() -> None:
    joiner, other = trained(0), trained(5)
    joiner.resume(4, other.history.progress()[4])
    assert (joiner.history.step, joiner.lr) == (4, other.lr)
    assert joiner.history.answer(4) == answer(4)
    joiner.step(5)
    other.step(5)
    assert joiner.lr == other.lr
    assert joiner.scheduler.state_dict() == other.scheduler.state_dict()


def test_a_step_that_it_does_not_remember_any_more_comes_from_others() -> None:
    worker, other = trained(3), trained(2)
    worker.resume(1, None)
    worker.resume(0, other.history.progress()[0])
    assert (worker.history.step, worker.lr, worker.history.answer(0)) == (0, 0.5, answer(0))
    assert worker.scheduler.last_epoch == 1


class Secretive:
    """A scheduler whose state cannot be saved."""

    def state_dict(self) -> dict[str, Any]:
        return {"rule": {1, 2}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"rule": {1, 2}}

    def step(self) -> None:
        pass


def test_a_scheduler_that_cannot_travel_is_refused_by_a_joiner_only() -> None:
    worker = trained(3, Secretive())
    progress = worker.history.progress()
    assert progress[2].scheduler is None
    with pytest.raises(TrainerError, match="Secretive cannot be sent to a worker that joins"):
        trained(0, Secretive()).resume(2, progress[2])
    worker.resume(1, progress[1])
    assert worker.history.step == 1, "from its own memory"


def test_the_first_commit_of_an_epoch_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 11.5, 20.0, 20.25])
    monkeypatch.setattr(histories, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    worker = trained(0)  # reads the clock
    sent: list[dict[str, Any]] = []
    job: Any = SimpleNamespace(send=sent.append)
    history = worker.history
    history.committed(job, 1, 0.0)
    history.committed(job, 1, 0.0)
    assert (sent, history.median_s) == ([], 1.0)
    history.committed(job, 2, 0.25)
    assert sent == [{"type": "committed", "epoch": 2, "step": -1, "at": 20.0, "taken_over_s": 0.25}]
    history.committed(job, 2, 0.25)
    assert len(sent) == 1
    assert history.median_s == 0.25, "neither the time between two epochs nor a step of the epoch before"
    assert history.committed_at == 20.25


class Warmup(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler around another one, as people write it: the default state_dict has the inner object and a function."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inner = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        self.rule = lambda epoch: 1.0
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        if hasattr(self, "last_epoch") and self.last_epoch >= 1:
            self.inner.step()
        super().step(epoch)


def test_a_scheduler_inside_another_one_keeps_its_optimizer() -> None:
    """Its state was copied with everything it refers to, so that it went on with a copy of the optimizer."""
    worker, other = (trained(0) for _ in range(2))
    for each in (worker, other):
        each.scheduler = Warmup(each.optimizer)
        each.history._scheduler = each.scheduler
    for step in range(4):
        worker.step(step)
    for step in range(3):
        other.step(step)
    worker.resume(2, None)
    assert worker.scheduler.inner.optimizer is worker.optimizer
    for step in range(3, 6):
        worker.step(step)
        other.step(step)
    assert worker.lr == other.lr < 1.0
    joiner = trained(0)
    joiner.scheduler = joiner.history._scheduler = Warmup(joiner.optimizer)
    joiner.resume(5, worker.history.progress()[5])
    for each in (worker, joiner):
        each.step(6)
    assert joiner.lr == worker.lr
    assert joiner.scheduler.inner.optimizer is joiner.optimizer


class Forgetful(Secretive):
    def state_dict(self) -> dict[str, Any]:
        return {"now": time.perf_counter()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_what_cannot_be_saved_is_refused_at_the_start() -> None:
    with pytest.raises(TrainerError, match=r"the state of Secretive cannot be in a checkpoint \(TypeError: a set has no JSON form\)"):
        trained(0, Secretive()).history.check(saved=True)
    with pytest.raises(TrainerError, match=r"Forgetful cannot be in a checkpoint: its load_state_dict\(\) does not restore"):
        trained(0, Forgetful()).history.check(saved=True)
    trained(0, Secretive()).history.check(saved=False)
    trained(2).history.check(saved=True)
    worker = trained(2)
    worker.optimizer.param_groups[0]["odd"] = {1, 2}
    with pytest.raises(TrainerError, match="settings of parameter group 0 cannot be sent to other workers: a set has no JSON form"):
        worker.history.check(saved=False)
