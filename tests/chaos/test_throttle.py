"""A worker that is slowed down really is; work is shifted away from it, and no bit changes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import elastic
from elastic.chaos.throttle import Throttle
from elastic.errors import SettingsError
from tests.engine import models

STEPS, WIDTH = 40, 1100


class Wide(nn.Module):
    """Takes milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(values))


def train(job: elastic.Job) -> dict[str, object] | None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[job.worker % os.cpu_count()]})  # pyright: ignore[reportOperatorIssue]
    torch.manual_seed(3)
    layers = [nn.Linear(models.WIDTH, WIDTH), Wide(), Wide(), nn.Linear(WIDTH, 8)]
    trainer = elastic.Trainer(
        nn.Sequential(*layers),
        models.cross_entropy,
        lambda p: torch.optim.SGD(p, lr=0.01),
        models.Rows(),
        batch_size=256,
        micro_batch_size=32,
    )
    losses = [report.loss for report in trainer.run(STEPS)]
    digest = trainer.digest()
    workers = trainer.statistics()
    return {"digest": digest, "losses": losses, "workers": workers} if workers is not None else None


@pytest.mark.slow
def test_work_is_shifted_from_a_slow_worker(tmp_path: Path, leftovers: None) -> None:
    even = elastic.run(train, workers=2, stages=1, directory=tmp_path / "even")
    with Throttle(tmp_path / "slow", {1: 4.0}) as throttle:
        shifted = elastic.run(train, workers=2, stages=1, directory=tmp_path / "slow")
    assert throttle.cycles > 50
    assert [found["kind"] for found in even.incidents] == []
    changes = [found for found in shifted.incidents if found["kind"] == "rebalance"]
    assert changes
    assert "worker 1 takes" in changes[0]["why"]
    assert changes[0]["steps_redone"] == changes[0]["bytes_moved"] == 0
    for key in ("digest", "losses"):
        assert shifted.value[key] == even.value[key]


@pytest.mark.slow
def test_layers_are_shifted_from_a_slow_worker_that_is_alone_in_its_stage(tmp_path: Path, leftovers: None) -> None:
    even = elastic.run(train, workers=2, stages=2, directory=tmp_path / "even", rebalance=False)
    with Throttle(tmp_path / "slow", {1: 4.0}) as throttle:
        shifted = elastic.run(train, workers=2, stages=2, directory=tmp_path / "slow")
    assert throttle.cycles > 50
    changes = [found for found in shifted.incidents if found["kind"] == "rebalance"]
    assert changes
    assert "worker 1 takes" in changes[0]["why"]
    assert changes[0]["layout_before"] != changes[0]["layout_after"]
    assert 0 < changes[0]["bytes_moved"] == changes[0]["bytes_minimum"]
    held = {each["worker"]: each["parameter_bytes"] for each in shifted.value["workers"]}
    assert held[1] < held[0]
    for key in ("digest", "losses"):
        assert shifted.value[key] == even.value[key]


def test_a_throttled_process_runs_again_when_it_is_closed(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        while True:
            pass
    try:
        (tmp_path / "members.json").write_text(f'{{"epoch": 1, "members": [{{"worker": 0, "pid": {pid}}}], "forkserver": {os.getpid()}}}')
        with Throttle(tmp_path, {0: 4.0}) as throttle:
            time.sleep(0.3)
            used_s = _cpu_s(pid)
            time.sleep(0.5)
            used_s = _cpu_s(pid) - used_s
        assert throttle.cycles > 5
        assert 0 < used_s < 0.35, "a quarter of the time, more or less"
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_factor_below_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"place 1 cannot be slowed by 0\.5"):
        Throttle(tmp_path, {1: 0.5})
