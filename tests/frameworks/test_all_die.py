"""Tests that frameworks go on where new workers take over the memory of all workers, who have died at once."""

from __future__ import annotations

import functools
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import elastic
from tests.recovery.outliving import Fate

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

ALL = [0, 1, 2]
FRAMEWORKS = {"huggingface": ("transformers", "trainings"), "lightning": ("lightning", "modules"), "accelerate": ("accelerate", "loops")}
LISTED = {"huggingface": None, "lightning": "noted", "accelerate": "reports"}


def train(job: elastic.Job, kind: str, folder: str, fate: list[Any]) -> Any:
    if fate and job.worker == 0:
        Fate(job, fate).install()
    module = import_module(f"tests.frameworks.{FRAMEWORKS[kind][1]}")
    if kind == "huggingface":
        return module.train(job, folder)
    return module.train(job) if kind == "lightning" else module.accelerated(job)


@functools.cache
def calm(kind: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return elastic.run(train, args=[kind, folder, []], workers=1).value


@pytest.mark.parametrize("phase", ["forward", "gather"])
@pytest.mark.parametrize("kind", FRAMEWORKS)
def test_all_die_at_once(kind: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new workers' loops begin with the report of the newest step, which nobody is left who has seen it."""
    if find_spec(FRAMEWORKS[kind][0]) is None:
        pytest.skip(f"needs {FRAMEWORKS[kind][0]}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    result = elastic.run(train, args=[kind, str(tmp_path), ["enter", 3, 1, phase, ALL]], workers=3)
    died = {worker for found in result.incidents if found["kind"] == "death" for worker in (found["worker"], *found["also"])}
    assert died == {*ALL}
    value, expected = dict(result.value), dict(calm(kind))
    if (listed := LISTED[kind]) is not None:  # these lists do not continue in a worker that joins
        for given in (value, expected):
            given["losses"] = given.get("losses", [])[-1:]
        there = value[listed]
        assert len(there) >= 3
        expected[listed] = expected[listed][-len(there) :]
    assert value == expected
