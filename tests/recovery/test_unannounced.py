"""Tests that workers that fail without announcing it are replaced: the right one, with the evidence, and with the bits of a calm run."""

from __future__ import annotations

import functools
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.engine.stage import LayerRunner
from tests.engine import models
from tests.recovery import outliving

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 16


def sleeps() -> None:
    time.sleep(3600)


def spins() -> None:
    while True:
        pass


def awaits() -> None:
    """As a collective does that not all have joined."""
    os.read(os.pipe()[0], 1)


def is_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[], None]] = {each.__name__: each for each in (sleeps, spins, awaits, is_stopped)}


def train(job: Any, folder: str, faults: dict[str, Any], *arguments: Any) -> Any:
    """`faults` by worker: `[fault, where, step]`; each happens once. `where`: "forward", "backward", "load", or a phase of a recovery."""
    fault, where, step = faults.get(str(job.worker), ("", "", 0))

    def happens() -> None:
        first = Path(folder, f"fault-{job.worker}")
        if not first.exists():
            first.touch()
            FAULTS[fault]()

    if where in ("forward", "backward"):
        run = getattr(LayerRunner, where)

        def runs(self: LayerRunner, now: int, *rest: Any) -> Any:
            if now == step:
                happens()
            return run(self, now, *rest)

        setattr(LayerRunner, where, runs)
    elif where == "load":
        take = models.Rows.__getitem__
        models.Rows.__getitem__ = lambda self, index: (happens() if job.step == step else None, take(self, index))[1]
    elif where:
        enter = job.enter
        job.enter = lambda phase, now, micro_batch=-1: (enter(phase, now, micro_batch), happens() if phase == where else None)
    return outliving.train(job, folder, *arguments)


def run(tmp_path: Path, faults: dict[str, Any], fates: dict[str, Any] | None = None, **options: Any) -> elastic.JobResult:
    arguments = [str(tmp_path), faults, "adamw", STEPS, fates or {}]
    options = {"workers": 3, "stages": 1, "rebalance": False, **options}
    return elastic.run(train, args=arguments, directory=tmp_path / "run", **options)


@functools.cache
def calm() -> Any:
    """Returns the value of a job that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), {}, workers=1).value


def lost(result: elastic.JobResult) -> set[int]:
    found = [incident for incident in result.incidents if incident["kind"] in ("death", "eviction")]
    return {worker for incident in found for worker in (incident["worker"], *incident["also"])}


@pytest.mark.parametrize("stages", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("fault", "where", "cause", "evidence"),
    [
        ("sleeps", "forward", "hung", "it has used no processor for 1.*in forward of step 9, micro-batch .*(state S in .*sleep)"),
        ("awaits", "backward", "hung", "it has used no processor for 1.*in backward of step 9, micro-batch .*pipe"),
        ("spins", "forward", "spinning", "it has used 1.* s of processor time in .* in forward of step 9, micro-batch"),
    ],
)
def test_hung_in_a_step(tmp_path: Path, fault: str, where: str, cause: str, evidence: str, stages: int) -> None:
    result = run(tmp_path, {"1": [fault, where, 9]}, stages=stages, hung_after=1.0)
    assert result.value == calm()
    assert lost(result) == {1}
    (found,) = (incident for incident in result.incidents if incident["kind"] == "eviction")
    assert found["cause"] == cause
    assert found["step"] == 9
    assert re.search(evidence, found["why"])
