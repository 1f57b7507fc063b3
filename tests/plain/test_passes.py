"""Tests of loops over the loader that are counted in other ways than by one `loader.epochs`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from elastic.worker.after_return import NoStepLeft
from elastic.worker.job import Job
from elastic.worker.plain import loop as plain_loop
from elastic.worker.plain.loop import Place
from elastic.worker.plain.passes import Passes
from elastic.worker.trainer import Trainer
from tests.plain import loops
from tests.plain.test_source import loader_of
from tests.recovery import forks
from tests.recovery.forks import WorkerFailed, die, when

SIZES = {"batch_size": 8, "micro_batch_size": 4}  # five steps an epoch


def body(job: Job, net: Any, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    functional.cross_entropy(net(x), y).backward()
    job.clip_grad_norm_(0.5)
    optimizer.step()
    optimizer.zero_grad()


def train(job: Job, kind: str) -> dict[str, Any]:
    """`kind`: how passes are counted."""
    net = loops.model()
    net, optimizer, loader = job.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loops.Rows(), **SIZES)
    steps: list[Any] = []

    def one(epoch: int, rate: float, leave_at: int | None = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for x, y in loader:
            body(job, net, optimizer, x, y)
            if loader.report is not None:
                steps.append((loader.report.step, epoch, rate))
                if loader.report.step == leave_at:
                    break

    if kind == "pass before":
        one(-1, 0.3)
    for epoch in loader.epochs(2 if kind != "left" else 9):
        one(epoch, 0.1)
        if kind == "left" and epoch == 1:
            break
    if kind == "left in a pass":
        one(-1, 0.3, leave_at=12)
    for epoch in loader.epochs(3):
        one(epoch, 0.1 / (epoch + 2))
    return {"steps": steps, "digest": loader.digest()}


@cache
def calm(kind: str) -> dict[str, Any]:
    return forks.run(1, train=partial(train, kind=kind)).results[0]


KINDS = {"twice": [2, 3], "left": [2, 3], "pass before": [1, 2, 3], "left in a pass": [2, 0.6, 3]}


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize("step", [pytest.param(step, marks=pytest.mark.long) if step != 13 else step for step in (3, 7, 13, 22)])
@pytest.mark.parametrize("kind", KINDS)
def test_epochs_may_be_counted_again(kind: str, step: int) -> None:
    expected = calm(kind)
    assert len(expected["steps"]) == round(sum(KINDS[kind]) * 5)
    assert [epoch for _, epoch, _ in expected["steps"][-15:]] == [0] * 5 + [1] * 5 + [2] * 5
    if step >= len(expected["steps"]):
        step = len(expected["steps"]) - 3

    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", step, die)

    agent = forks.run(2, train=partial(train, kind=kind), prepare=prepare, least=2)
    assert sorted(agent.results) == [0, 2]
    for result in agent.results.values():
        assert result["digest"] == expected["digest"]
        assert result["steps"] == expected["steps"][-len(result["steps"]) :]


def by_next(job: Job, kind: str, steps: int = 23) -> dict[str, Any]:
    net = loops.model()
    net, optimizer, loader = job.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loops.Rows(), **SIZES)

    def cycled() -> Iterator[Any]:
        while True:
            yield from loader

    batches = cycled() if kind == "generator" else iter(loader)
    while loader.report is None or loader.report.step < steps - 1:
        try:
            x, y = next(batches)
        except StopIteration:
            batches = iter(loader)
            x, y = next(batches)
        body(job, net, optimizer, x, y)
    return {"step": loader.report.step, "digest": loader.digest()}


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.long), pytest.param(12, marks=pytest.mark.long), 18])
@pytest.mark.parametrize("kind", ["next", "generator"])
def test_whoever_counts_no_passes_gets_those_that_are_not_over(kind: str, step: int) -> None:
    def prepare(job: Job) -> None:
        if job.worker == 1:
            when(job, "backward", step, die)

    expected = forks.run(1, train=partial(by_next, kind=kind)).results[0]
    agent = forks.run(2, train=partial(by_next, kind=kind), prepare=prepare, least=2)
    assert sorted(agent.results) == [0, 2]
    assert all(result == expected for result in agent.results.values())


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize(("kind", "ends"), [("next", "StopIteration"), ("generator", NoStepLeft.__name__)])
def test_a_stop_ends_a_loop_that_counts_no_passes(kind: str, ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's main function takes both as a return, in a job that stops."""
    monkeypatch.setattr(plain_loop, "_EMPTY_STOPPED", 10)

    def prepare(job: Job) -> None:
        when(job, "forward", 7, lambda: job.deliver({"type": "stop"}))

    with pytest.raises(WorkerFailed, match=ends):
        forks.run(1, train=partial(by_next, kind=kind), prepare=prepare)


def endless(job: Job) -> None:
    net = loops.model()
    net, optimizer, loader = job.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loops.Rows(), steps=3, **SIZES)
    while True:
        for x, y in loader:
            body(job, net, optimizer, x, y)


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
def test_loops_without_a_step_that_do_not_end_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_loop, "_EMPTY", 10)
    with pytest.raises(WorkerFailed, match="the last 10 loops over the loader had no step, since 3 have been taken"):
        forks.run(1, train=endless)


def grows(job: Job, how: str) -> None:
    net, rows = loops.model(), [(torch.ones(loops.WIDTH), 1)] * 16
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if how == "Trainer":
        trainer = Trainer(net, lambda output, given: functional.cross_entropy(output, given[1]), optimizer, rows, **SIZES)
        for steps in (2, 4):
            for _ in trainer.run(steps):
                pass
            rows.append(rows[0])
        return
    net, optimizer, loader = job.prepare(net, optimizer, DataLoader(rows, batch_size=8), micro_batch_size=4)  # type: ignore[arg-type]
    for _ in loader.epochs(3):
        for x, y in loader:
            body(job, net, optimizer, x, y)
        rows.append(rows[0]) if how == "grows" else rows.pop()


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize(("how", "now"), [("grows", 17), ("shrinks", 15), ("Trainer", 17)])
def test_a_dataset_of_another_length_is_refused(how: str, now: int) -> None:
    with pytest.raises(WorkerFailed, match=f"the dataset has {now} samples when a loop begins, and 16 when the training began"):
        forks.run(1, train=partial(grows, how=how))


def test_a_worker_that_joins_leaves_out_what_was_counted_before() -> None:
    """It joins in the third epoch of the second count, when the first was left after one of nine epochs."""
    loop: Any = SimpleNamespace(taken=0, stopped=False, resumed_at=None, place=Place.OUTSIDE, built=False)
    passes = Passes(lambda number: 10 * (number + 1), whole=True)
    loader, found = loader_of(loop, passes), []
    for count in (9, 3):
        for epoch in loader.epochs(count):
            found.append((count, epoch))
            if loop.built:
                loop.taken = 40
            else:
                loop.built, loop.taken = True, 35
                passes.load_state_dict({"number": 0, "skipped": 0, "counts": [0, 1]})
    assert found == [(9, 0), (3, 2)]


def test_the_loader_has_attributes_of_the_dataloader() -> None:
    rows = loops.Rows()
    loop: Any = SimpleNamespace(built=False)
    given = DataLoader(rows, batch_size=4, num_workers=2, drop_last=True)
    loader = loader_of(loop, data=given)
    assert (loader.dataset, loader.batch_size) == (rows, 8)
    assert (loader.num_workers, loader.drop_last, loader.sampler) == (2, True, given.sampler)
    assert loader_of(loop, data=rows).dataset is rows
    for data, kind in ((given, "DataLoader"), (rows, "Rows")):
        with pytest.raises(AttributeError, match=f"no attribute shape, and job.prepare was given a {kind}: ask the object that was given"):
            _ = loader_of(loop, data=data).shape
    assert not hasattr(loader_of(loop, data=rows), "num_workers")
