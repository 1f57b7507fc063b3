"""Tests loops of Accelerate in a job: the same steps on any number of workers, whoever dies."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from elastic.errors import NotInJob, TrainerError
from elastic.worker import job as jobs
from elastic.worker.job import Job
from elastic.worker.plain.loop import Place
from tests.recovery import forks
from tests.recovery.forks import Agent, die, when

pytest.importorskip("accelerate", reason="needs accelerate")

from elastic.integrations import accelerate_refusals as refusals
from elastic.integrations.accelerate import ElasticAccelerator
from tests.frameworks import loops


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "LAYERS", 1)


def dies(job: Job) -> None:
    if job.worker == 1:
        when(job, "backward", 2, die)


def check(agent: Agent, calm: dict[str, Any]) -> None:
    """Compares the results of all workers; one that has joined has only the last of them, and the loop in which it has joined before."""
    for result in agent.results.values():
        assert result["reports"] == calm["reports"][-len(result["reports"]) :]
        assert result["losses"][-1] == calm["losses"][-1]
    assert calm["digest"] in [result["digest"] for result in agent.results.values()]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.long), pytest.param("bf16", marks=pytest.mark.long)])
def test_a_worker_that_dies_and_one_that_joins_change_nothing(precision: str) -> None:
    train = partial(loops.accelerated, precision=precision)
    calm = forks.run(1, train=train).results[0]
    assert [report[0] for report in calm["reports"]] == [0, 1, 2, 3, 4, 5]
    agent = forks.run(2, train=train, prepare=dies, least=2)
    assert sorted(agent.results) == [0, 2]
    check(agent, calm)


@pytest.mark.slow
@pytest.mark.long
def test_a_job_continues_from_what_save_state_has_saved(tmp_path: Path) -> None:
    calm = forks.run(1, train=loops.accelerated).results[0]

    def stops(job: Job) -> None:
        when(job, "forward", 4, lambda: job.deliver({"type": "stop"}))

    saved = partial(loops.accelerated, checkpoint=str(tmp_path))
    forks.run(2, train=saved, prepare=stops)
    again = forks.run(3, train=saved)
    assert [report[0] for report in again.results[0]["reports"]] == [5]
    check(again, calm)


def test_it_is_refused_outside_of_a_job() -> None:
    with pytest.raises(NotInJob):
        ElasticAccelerator()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Any:
    job = SimpleNamespace(device="cpu", leader=False)
    monkeypatch.setattr(jobs, "_current", job)
    return job


@pytest.mark.parametrize(
    ("options", "said"),
    [({"log_with": "all"}, "elastic.run(log=...)"), ({"dynamo_backend": "eager"}, "model.compile()")],
)
@pytest.mark.usefixtures("job")
def test_settings_that_have_no_place_in_a_job_are_refused(options: dict[str, Any], said: str) -> None:
    named: dict[str, Any] = {"log_with": [], "use_distributed": False, "mixed_precision": "no", "device": torch.device("cpu")}
    backend = options.pop("dynamo_backend", "no").upper()
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=backend))
    with pytest.raises(TrainerError, match=re.escape(said)):
        refusals.check(SimpleNamespace(**named | options, state=state), jobs._current)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("job")
def test_a_precision_that_needs_scales_is_refused() -> None:
    named = SimpleNamespace(log_with=[], use_distributed=False, mixed_precision="fp16", num_processes=1)
    with pytest.raises(TrainerError, match="use 'bf16'"):
        refusals.check(named, jobs._current)  # pyright: ignore[reportArgumentType]


NET = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(NET.parameters(), lr=0.1)
LOADER, SHUFFLED = DataLoader(range(8)), DataLoader(range(8), shuffle=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda it: it.prepare(NET, OPTIMIZER), "0 DataLoaders"),
        (lambda it: it.prepare(NET, NET, OPTIMIZER, LOADER), "2 models"),
        (lambda it: it.prepare(NET, OPTIMIZER, LOADER, SHUFFLED), "the training's loader first"),
        (lambda it: it.prepare(torch.optim.lr_scheduler.ExponentialLR(OPTIMIZER, 0.9)), "without its optimizer"),
        (lambda it: it.clip_grad_norm_([], 1.0, norm_type=1), "leave norm_type= out"),
        (lambda it: it.clip_grad_value_([], 1.0), "use clip_grad_norm_"),
        (lambda it: it.save_state("runs/a"), "prepare_options={'checkpoint'"),
        (lambda it: it.load_state("runs/a"), "by itself"),
        (lambda it: it.skip_first_batches(LOADER, 3), "by itself"),
        (lambda it: it.set_trigger(), "loader.report.loss"),
    ],
)
@pytest.mark.usefixtures("job")
def test_calls_that_have_no_place_in_a_job_are_refused(call: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(TrainerError, match=re.escape(said)):
        call(ElasticAccelerator())


def test_gathering_in_the_middle_of_a_step_is_refused() -> None:
    refusals.check_gather(Place.COMMITTED)
    for place in (Place.BODY, Place.TAIL):
        with pytest.raises(TrainerError, match=r"use loader\.report\.loss"):
            refusals.check_gather(place)


def test_another_directory_for_saves_is_refused() -> None:
    refusals.check_save(None, "runs/a")
    refusals.check_save("runs/../runs/a", "runs/a")
    with pytest.raises(TrainerError, match="leave the argument out"):
        refusals.check_save("runs/b", "runs/a")


def test_only_the_leader_prints_and_saves(job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = ElasticAccelerator()
    for leader in (False, True):
        job.leader = leader
        accelerator.print("said")
        accelerator.on_main_process(lambda: print("done"))()
        accelerator.save({"a": torch.ones(1)}, tmp_path / "saved.pt")
        assert (tmp_path / "saved.pt").exists() == leader
    assert capsys.readouterr().out == "said\ndone\n"
