"""Tests that loop bodies affect the next step as in a plain loop, through deaths and joins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import elastic
from tests.recovery import loops

STEPS = 12
Lines = list[list[float]]


def run(folder: Path, **options: Any) -> tuple[dict[int, Lines], Any]:
    """Runs a job; returns what each worker was given, and the job's result."""
    arguments = [str(folder), STEPS, options.pop("dies", None), options.pop("saves", None)]
    result = elastic.run(loops.train, args=arguments, directory=folder / "run", rebalance=False, **options)
    files = {int(path.stem.partition("-")[2]): path for path in folder.glob("steps-*.jsonl")}
    return {worker: [json.loads(line) for line in path.read_text().splitlines()] for worker, path in files.items()}, result


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lines, str]:
    logs, result = run(tmp_path_factory.mktemp("calm"), workers=1)
    return logs[0], result.value


def check(calm: tuple[Lines, str], logs: dict[int, Lines], result: Any, *, founders: int, lost: list[int]) -> None:
    lines, digest = calm
    for worker, log in logs.items():
        first = 0 if worker < founders else lines.index(log[0])
        assert log == lines[first : first + len(log)], f"worker {worker}"
    assert max(map(len, logs.values())) == len(lines)
    assert result.value == digest
    died = [worker for found in result.incidents if found["kind"] == "death" for worker in (found["worker"], *found["also"])]
    assert sorted(died) == lost


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "options"),
    [
        pytest.param({"1": ["replicate", 3, 1], "2": ["loop", 7, 1]}, {"workers": 3, "stages": 2, "respawn": False}, id="and nobody joins"),
        pytest.param(
            {"1": ["evaluate", 4, 1], "2": ["backward", 8, 1]},
            {"workers": 2, "min_workers": 2},
            id="and others join at once",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"1": ["apply", 2, 1], "2": ["gather", 5, 1]}, {"workers": 3, "stages": 1}, id="and others join", marks=pytest.mark.long
        ),
    ],
)
def test_what_loop_bodies_set_is_the_same_whoever_dies(
    tmp_path: Path, calm: tuple[Lines, str], dies: dict[str, Any], options: dict[str, Any]
) -> None:
    logs, result = run(tmp_path, dies=dies, **options)
    check(calm, logs, result, founders=options["workers"], lost=[1, 2])


@pytest.mark.long
@pytest.mark.slow
def test_steps_behind_a_checkpoint_are_taken_again_with_what_loop_bodies_had_set(tmp_path: Path, calm: tuple[Lines, str]) -> None:
    saves = {"checkpoint": str(tmp_path / "saved"), "every": 4}
    dies = {"1": ["backward", 7, 1], "2": ["backward", 7, 1]}
    logs, result = run(tmp_path, dies=dies, saves=saves, workers=3, stages=1, respawn=False)
    check(calm, logs, result, founders=3, lost=[1, 2])
    assert any(found["steps_redone"] >= 3 for found in result.incidents)
