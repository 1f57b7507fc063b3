"""Tests jobs with running statistics whose workers die: statistics equal an undisturbed job's, on all workers and on disk."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elastic
from elastic.checkpoint.convert.run import open_any
from tests.recovery import running

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 12


def run(dies: dict[str, list[Any]], folder: Path | None = None, *, steps: int = STEPS, average: bool = False, **options: Any) -> Any:
    arguments = [steps, dies, None if folder is None else str(folder), average]
    return elastic.run(running.train, args=arguments, rebalance=False, **options)


def saved(folder: Path) -> dict[str, Any]:
    _, source = open_any(folder)
    with closing(source):
        names = sorted(source.contents.buffers)
        return {name: source.read(name, "param", 0, int(np.prod(source.contents.tensors[name]["param"].shape))) for name in names}


def flat(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


@pytest.mark.long
def test_statistics_survive_deaths_and_are_saved_and_resumed(tmp_path: Path) -> None:
    """A worker dies when some have applied a step, its replacement joins, the coordinator dies; another job resumes from the checkpoint."""
    dies = {"1": ["apply", 4], "0": ["backward", 8]}
    result = run(dies, tmp_path / "saved", workers=3, stages=2)
    assert [each["worker"] for each in result.incidents if each["kind"] == "death"] == [1, 0]
    value = result.value
    assert not [each for each in result.incidents if each["kind"] == "damage"], "a save has the spares' memory written to"
    assert all(value["everybody"])
    on_disk = saved(tmp_path / "saved")
    assert {name: flat(values.tolist()) for name, values in on_disk.items()} == {name: flat(v) for name, v in value["buffers"].items()}

    # The steps after those, and the evaluation, are equal only if all that was saved equals an undisturbed job's.
    longer = run({}, workers=1, steps=STEPS + 3).value
    resumed = run({}, tmp_path / "saved", workers=2, stages=2, steps=STEPS + 3).value
    assert {**resumed, "everybody": 0, "workers": 0} == {**longer, "everybody": 0, "workers": 0}


@pytest.mark.long
def test_joiners_get_what_is_not_exact_either(tmp_path: Path) -> None:
    result = run({"1": ["backward", 4]}, tmp_path / "saved", average=True, steps=40, workers=3, stages=2)
    assert not [each for each in result.incidents if each["kind"] == "damage"], "a save has the spares' memory written to"
    assert all(result.value["everybody"])
    mean = result.value["buffers"]["3.mean"]
    assert any(mean)
    assert flat(saved(tmp_path / "saved")["3.mean"].tolist()) == mean


def test_names_are_those_of_torch() -> None:
    assert all(
        re.fullmatch(r"\d(\.0)?\.(running_mean|running_var|num_batches_tracked)", name) for name, _ in running.build().named_buffers()
    )
