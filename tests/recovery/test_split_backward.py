"""Tests that jobs whose backwards are split in two parts have the bits of other jobs, also if workers die between the parts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.host.facts import processors
from tests.recovery import outliving, split
from tests.recovery.test_outliving import STEPS, calm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("leftovers"),
    pytest.mark.skipif(processors() < 2, reason="backwards are not split if workers share a processor"),
]


def run(folder: Path, case: str, workers: int, stages: int, fates: dict[int, list[Any]]) -> elastic.JobResult:
    arguments = [str(folder), case, STEPS, {str(worker): fate for worker, fate in fates.items()}]
    result = elastic.run(split.train, args=arguments, directory=folder / "run", rebalance=False, workers=workers, stages=stages)
    assert result.value == calm(case)["value"]
    return result


def splits(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("splits-*"))


def test_a_pipeline_splits_its_backwards(tmp_path: Path) -> None:
    run(tmp_path, "adamw", 2, 2, {})
    assert splits(tmp_path) >= STEPS * 6, "in every micro-batch of every step"


@pytest.mark.parametrize(
    "times",
    [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 2)), 3, *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 12))],
)
def test_a_worker_of_the_first_stage_dies_while_the_second_has_half_a_backward_left(tmp_path: Path, times: int) -> None:
    result = run(
        tmp_path, "adamw", 2, 2, {0: ["enter", 4, times, "backward", [0]]} if times < 7 else {1: ["enter", 4, times, "backward", [1]]}
    )
    assert [incident["kind"] for incident in result.incidents].count("death") == 1
    assert splits(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(24))
def test_random_models_and_deaths(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    case = chance.choice(outliving.EXACT)
    workers = chance.randint(2, 3)
    fates: dict[int, list[Any]] = {
        worker: ["enter", chance.choice([4, 4, 5]), chance.randint(1, 12), "backward", [worker]]
        for worker in chance.sample(range(workers), chance.randint(1, workers - 1))
    }
    run(tmp_path, case, workers, chance.randint(2, workers), fates)
