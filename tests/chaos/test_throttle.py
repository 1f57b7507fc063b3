"""Tests that a throttled worker runs slower, that work is shifted away from it, and that no bit changes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import elastic
from elastic.chaos.throttle import Throttle
from elastic.errors import SettingsError
from tests.engine import models

MOST_STEPS, BEHIND, WIDTH = 250, 4, 1100


class Wide(nn.Module):
    """Takes milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(values))


def train(job: elastic.Job, steps: int | None) -> dict[str, object] | None:
    """Trains for that many steps, or until a few steps after the plan has changed."""
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
    losses, behind = [], 0
    for report in trainer.run(MOST_STEPS if steps is None else steps):
        losses.append(report.loss)
        behind += report.epoch > 1
        if steps is None and behind == BEHIND:
            break
    digest = trainer.digest()
    workers = trainer.statistics()
    return {"digest": digest, "losses": losses, "workers": workers} if workers is not None else None


def shifted(folder: Path, stages: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first change of a job with a slow worker, and what the leader returned; compared with the same steps undisturbed."""
    with Throttle(folder / "slow", {1: 4.0}) as throttle:
        slowed = elastic.run(train, workers=2, stages=stages, directory=folder / "slow", args=[None])
    assert throttle.cycles > 50
    changes = [found for found in slowed.incidents if found["kind"] == "rebalance"]
    assert changes
    assert "worker 1 takes" in changes[0]["why"]
    assert changes[0]["steps_redone"] == 0
    steps = len(slowed.value["losses"])
    calm = elastic.run(train, workers=2, stages=stages, directory=folder / "calm", args=[steps], rebalance=False)
    for key in ("digest", "losses"):
        assert slowed.value[key] == calm.value[key]
    return changes[0], slowed.value


@pytest.mark.slow
@pytest.mark.long
def test_work_is_shifted_from_a_slow_worker(tmp_path: Path, leftovers: None) -> None:
    change, _ = shifted(tmp_path, 1)
    assert change["bytes_moved"] == 0


@pytest.mark.slow
@pytest.mark.long
def test_layers_are_shifted_from_a_slow_worker_that_is_alone_in_its_stage(tmp_path: Path, leftovers: None) -> None:
    change, value = shifted(tmp_path, 2)
    assert change["layout_before"] != change["layout_after"]
    assert change["bytes_moved"] == change["bytes_minimum"]
    held = {each["worker"]: len(each["layers"]) for each in value["workers"]}
    assert held[1] < held[0]


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
