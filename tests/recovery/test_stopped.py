"""Tests that a worker whose process is stopped from outside is replaced within seconds, and that nothing is lost."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.engine.stage import LayerRunner
from tests.recovery import outliving
from tests.recovery.test_outliving import STEPS, calm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]


def train(job: Any, folder: str, stops: list[int], *arguments: Any) -> Any:
    """The workers in `stops` stop themselves in step 4, once."""
    run = LayerRunner.forward

    def forward(self: LayerRunner, step: int, micro_batch: int, crossing: Any) -> Any:
        first = Path(folder, f"stopped-{job.worker}")
        if job.worker in stops and step == 4 and not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return run(self, step, micro_batch, crossing)

    LayerRunner.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    return outliving.train(job, folder, *arguments)


def lost(result: elastic.JobResult) -> set[int]:
    found = [incident for incident in result.incidents if incident["kind"] in ("death", "eviction")]
    return {worker for incident in found for worker in (incident["worker"], *incident["also"])}


def run(tmp_path: Path, stops: list[int], fates: dict[str, Any] | None = None, **options: Any) -> elastic.JobResult:
    arguments = [str(tmp_path), stops, "adamw", STEPS, fates or {}]
    return elastic.run(train, args=arguments, directory=tmp_path / "run", rebalance=False, workers=3, **options)


@pytest.mark.parametrize("stages", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_stopped_worker_is_replaced(tmp_path: Path, stages: int, capfd: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, [1], stages=stages, stopped_after=1.0)
    assert result.value == calm("adamw")["value"]
    (found,) = (incident for incident in result.incidents if incident["kind"] == "eviction")
    assert found["worker"] == 1
    said = re.search(r"its process has been stopped for (\d+\.\d) s, in forward of step (\d+)", found["why"])
    assert said is not None
    assert float(said[1]) >= 1.0
    assert int(said[2]) == found["step"] == 4
    assert said[0] in capfd.readouterr().err


@pytest.mark.long
def test_two_stopped_workers_are_replaced(tmp_path: Path) -> None:
    result = run(tmp_path, [0, 2], stages=1, stopped_after=1.0)
    assert result.value == calm("adamw")["value"]
    assert lost(result) == {0, 2}


@pytest.mark.long
def test_a_worker_that_is_stopped_while_the_others_recover_is_replaced(tmp_path: Path) -> None:
    result = run(tmp_path, [2], {"0": ["enter", 4, 1, "forward", [0]]}, stages=1, stopped_after=1.0)
    assert result.value == calm("adamw")["value"]
    assert lost(result) == {0, 2}
