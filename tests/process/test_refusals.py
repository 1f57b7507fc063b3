"""Tests what is said of scripts for another launcher: their process groups, wrapped models, ranks, devices and exits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

import elastic
from elastic.errors import TrainerError
from elastic.worker import job as jobs
from elastic.worker import main
from elastic.worker.refusals import check_model


def said(call: Any) -> str:
    """Returns what the job ends with if train_fn makes this call."""
    try:
        call()
    except BaseException as error:
        return main._failure(SimpleNamespace(epoch=1, step=2), error)["traceback"]  # type: ignore[arg-type]
    raise AssertionError("it raises nothing")


def exits(code: Any) -> Any:
    def call() -> None:
        raise SystemExit(code)

    return call


def groups() -> None:
    torch.distributed.init_process_group("gloo")


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (exits(None), "train_fn called sys.exit(None), which ends the job as a failure, without saving its last step. To end "),
        (exits(3), "train_fn called sys.exit(3), "),
        (groups, "leave out init_process_group"),
        (lambda: int({}["LOCAL_RANK"]), "job.worker, job.leader and job.device say who"),
        (lambda: nn.Linear(2, 2).to("cuda"), "Build the model and the optimizer on the CPU"),
    ],
)
def test_a_script_for_another_launcher_is_told_what_to_do(call: Any, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "on the CPU" in advice and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    lines = said(call).splitlines()
    assert lines[0].startswith("Traceback")
    assert not lines[-2]
    assert advice in lines[-1]


@pytest.mark.parametrize("error", [KeyError("name"), ValueError("rank"), RuntimeError("shapes"), KeyError(), AssertionError()])
def test_other_errors_are_shown_as_they_are(error: Exception) -> None:
    def call() -> None:
        raise error

    assert said(call).splitlines()[-1].startswith(type(error).__name__)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "current_job", lambda: SimpleNamespace(trains=False, threads=torch.get_num_threads()))


def trainer(model: Any) -> None:
    sizes = {"batch_size": 8, "micro_batch_size": 4}
    elastic.Trainer(model, lambda output, batch: output.sum(), lambda p: torch.optim.SGD(p, 0.1), lambda step, number: None, **sizes)


@pytest.mark.usefixtures("worker")
class TestTrainer:
    """A Trainer refuses what a plain loop refuses."""

    def test_a_process_group_of_the_script(self) -> None:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
        try:
            with pytest.raises(TrainerError, match="a group cannot go on without a lost worker: leave it out"):
                trainer(nn.Linear(2, 2))
        finally:
            torch.distributed.destroy_process_group()

    @pytest.mark.parametrize("listed", [False, True])
    def test_a_wrapped_model(self, listed: bool) -> None:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        torch.distributed.destroy_process_group()
        with pytest.raises(TrainerError, match="wrapped in DistributedDataParallel, which would average gradients by itself"):
            trainer([nn.Linear(2, 2), wrapped] if listed else wrapped)


def test_a_model_of_fsdp_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        model = fully_shard(nn.Linear(2, 2), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(TrainerError, match="wrapped in FSDPModule"):
        check_model(model)
