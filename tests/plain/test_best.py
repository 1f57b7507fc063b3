"""Tests of the best model of a plain loop, which is kept and loaded after it."""

from __future__ import annotations

from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from elastic.checkpoint import saver
from elastic.errors import TrainerError
from elastic.worker.job import Job
from tests.plain import loops
from tests.recovery import forks
from tests.recovery.forks import WorkerFailed, die, when

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_layer")]

VALUES = [5.0, 3.0, 4.0, float("nan"), 3.0, 6.0]
"""Of the epochs, the second of which is the best one: after 2 steps, of 7."""


def train(job: Job, folder: str, where: str = "epoch", stop: int | None = None, **options: Any) -> dict[str, Any]:
    """`where` update is called; `stop`: the epoch in which the loop is left, as by early stopping."""
    net = loops.model()
    given = {"checkpoint": folder, "keep": 1, **loops.SIZES, **options}
    net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.Rows(), **given)
    best = loader.keep_best()
    seen = {}
    for epoch in loader.epochs(len(VALUES)):
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if (report := loader.report) is not None:
                seen[report.step + 1] = digest_of(net)
                if where == "body" and best.update(abs(report.step - 1)):
                    assert best.step == report.step + 1
                if stop == epoch:
                    break
        if where == "epoch":
            best.update(VALUES[epoch])
        if stop == epoch:
            break
    last = loader.digest()
    best.load()
    loaded = loader.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in net.state_dict().items())
    return {"best": [best.value, best.step], "weights": digest_of(net), "last": last, "digest": loader.digest(), "seen": seen}


def digest_of(net: torch.nn.Module) -> str:
    return sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values())).hexdigest()


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


@pytest.mark.parametrize(("where", "value"), [("epoch", 3.0), ("body", 0.0)])
def test_the_best_model_is_loaded_also_where_all_that_saw_it_have_died(where: str, value: float, tmp_path: Path) -> None:
    calm = forks.run(1, train=partial(train, where=where, folder=str(tmp_path / "calm"))).results[0]
    assert calm["best"] == [value, 2]
    assert calm["weights"] == calm["seen"][2] != calm["seen"][7]
    assert calm["digest"] != calm["last"]
    assert saved(tmp_path / "calm") == ["step-00000002", "step-00000007"]

    def prepare(job: Job) -> None:
        for worker, step in ((0, 3), (1, 5)):
            if job.worker == worker:
                when(job, "forward", step, die, epoch=worker + 1)

    agent = forks.run(2, train=partial(train, where=where, folder=str(tmp_path / "killed")), prepare=prepare, least=2)
    assert not {0, 1} & agent.results.keys()
    for result in agent.results.values():
        assert {**result, "seen": {}} == {**calm, "seen": {}}


@pytest.mark.long
@pytest.mark.parametrize("stop", [2, 4])
def test_a_loop_that_is_left_keeps_its_last_step_too(stop: int, tmp_path: Path) -> None:
    """In the middle of the last epoch. The job's own parameters are saved, with which it would go on."""
    calm = forks.run(2, train=partial(train, folder=str(tmp_path), stop=stop, epochs=2)).results[0]
    assert calm["best"][0] == 3.0
    assert calm["weights"] == calm["seen"][calm["best"][1]]
    assert saved(tmp_path)[-1] == f"step-{max(calm['seen']):08d}"


@pytest.mark.long
def test_a_job_that_continues_knows_the_best_model_of_its_first_part(tmp_path: Path) -> None:
    calm = forks.run(1, train=partial(train, folder=str(tmp_path / "calm"))).results[0]

    def prepare(job: Job) -> None:
        when(job, "forward", 4, lambda: job.deliver({"type": "stop"}))

    stopped = str(tmp_path / "stopped")
    first = forks.run(2, train=partial(train, folder=stopped), prepare=prepare).results
    assert all(result["best"] == calm["best"] for result in first.values())
    assert saved(tmp_path / "stopped") == ["step-00000002", "step-00000005"]
    again = forks.run(3, train=partial(train, folder=stopped)).results
    assert all({**result, "seen": {}} == {**calm, "seen": {}} for result in again.values())


@pytest.mark.parametrize(("lost", "best"), [({2, 6}, [4.0, 3]), ({1, 2, 3}, [3.0, 6])])
def test_a_save_that_fails_leaves_the_best_model_before(
    lost: set[int], best: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first three epochs end after one, two and three steps, the fifth after six."""
    commit = saver.commit

    def fails(store: Any, plan: Any, ticket: Any, *more: Any, **named: Any) -> Any:
        if ticket.step in lost:
            raise OSError(28, "No space left on device")
        return commit(store, plan, ticket, *more, **named)

    monkeypatch.setattr(saver, "commit", fails)
    result = forks.run(2, train=partial(train, folder=str(tmp_path))).results[1]
    assert result["best"] == best
    assert result["weights"] == result["seen"][best[1]]
    assert saved(tmp_path) == [f"step-0000000{best[1]}", "step-00000007"]


def by_next(job: Job, folder: str) -> dict[str, Any]:
    net = loops.model()
    net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.batch, steps=9, checkpoint=folder, **loops.SIZES)
    best, seen, batches = loader.keep_best(), "", iter(loader)
    while loader.report is None or loader.report.step < 4:
        x, y = next(batches)
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if loader.report is not None and best.update(abs(loader.report.step - 1)):
            seen = digest_of(net)
    best.load()
    return {"best": best.step, "alike": digest_of(net) == seen, "digest": loader.digest()}


@pytest.mark.long
def test_a_loop_by_next_that_is_not_closed_is_over_when_the_best_model_is_loaded(tmp_path: Path) -> None:
    one, two = (forks.run(workers, train=partial(by_next, folder=str(tmp_path / str(workers)))).results for workers in (1, 2))
    assert one[0] == two[0] == two[1]
    assert (one[0]["best"], one[0]["alike"], saved(tmp_path / "1")) == (2, True, ["step-00000001", "step-00000002", "step-00000005"])


def refused(job: Job, kind: str, folder: str) -> None:
    net = loops.model()
    where = {} if kind == "no directory" else {"checkpoint": folder}
    net, optimizer, loader = job.prepare(net, loops.adamw(net), loops.batch, steps=2, **loops.SIZES, **where)
    best = loader.keep_best("larger" if kind == "mode" else "max")
    for x, y in loader:
        functional.cross_entropy(net(x), y).backward()
        if kind == "in a step" and loader.loop.built:
            best.update(1.0)
        optimizer.step()
        if loader.report is not None and kind == "in the loop":
            best.update(1.0)
            best.load()
    if kind == "text":
        best.update("good")
    if kind == "trained on":
        best.update(1.0)
    best.load()
    for _ in loader:
        pass


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no directory", r"keep_best\(\) has no directory to keep the best model in: give job.prepare checkpoint="),
        ("mode", r"keep_best\(mode='larger'\): use 'min'"),
        ("in a step", r"best.update\(\) is called in the middle of a step"),
        ("in the loop", r"a loop over the loader begins, or goes on, after best.load\(\)"),
        ("text", r"best.update\(\) got a str: give a number"),
        ("nothing", r"best.load\(\) has nothing to load: call best.update"),
        ("trained on", r"a loop over the loader begins, or goes on, after best.load\(\)"),
    ],
)
def test_what_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=f"{TrainerError.__name__}: .*{said}"):
        forks.run(1, train=partial(refused, kind=kind, folder=str(tmp_path)))
