"""Tests that survivors of a death compute no forward and no backward of the interrupted step twice."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.engine.stage import LayerRunner
from tests.recovery import outliving
from tests.recovery.test_outliving import STEPS, calm, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEP = 4


def train(job: Any, folder: str, *arguments: Any) -> Any:
    """Logs what each worker computes: forward or backward, step, micro-batch, layer."""
    log = Path(folder, f"computed-{job.worker}").open("a", buffering=1)  # noqa: SIM115

    def noting(name: str) -> None:
        run = getattr(LayerRunner, name)

        def noted(self: LayerRunner, step: int, micro_batch: int, *rest: Any, **options: Any) -> Any:
            found = run(self, step, micro_batch, *rest, **options)
            log.write(f"{name} {step} {micro_batch} {self.index}\n")
            return found

        setattr(LayerRunner, name, noted)

    noting("forward")
    noting("backward_in_parts")
    return outliving.train(job, folder, *arguments)


def ranges(layout: str) -> list[str]:
    return [stage.split("x")[0] for stage in layout.split()]


@pytest.mark.parametrize("case", ["adamw", pytest.param("batchnorm", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("victim", "phase", "times"),
    [
        pytest.param(*each, marks=[] if each == (1, "backward", 1) else [pytest.mark.long])
        for each in (
            (0, "forward", 2),
            (1, "backward", 1),
            (2, "backward", 2),
            (3, "backward", 3),
            (3, "forward", 1),
            (0, "reduce", 1),
            (2, "ready", 1),
        )
    ],
)
def test_survivors_compute_nothing_twice(tmp_path: Path, victim: int, phase: str, times: int, case: str) -> None:
    arguments = [str(tmp_path), case, STEPS, {str(victim): ["enter", STEP, times, phase, [victim]]}]
    result = elastic.run(train, args=arguments, directory=tmp_path / "run", rebalance=False, workers=4, stages=2)
    assert result.value == calm(case)["value"]
    (death,) = (incident for incident in result.incidents if incident["kind"] == "death")
    assert death["worker"] == victim
    moved = ranges(death["layout_before"]) != ranges(death["layout_after"])  # as the planner finds, from how fast the layers were measured
    for worker in {0, 1, 2, 3} - {victim}:
        lines = Path(tmp_path, f"computed-{worker}").read_text().splitlines()
        assert any(line.startswith(f"forward {STEP} ") for line in lines)
        again = [line for line, count in Counter(lines).items() if count > 1 and line.split()[1] == str(STEP)]
        assert again == [] or moved, worker


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_what_is_held_has_the_same_bits(tmp_path: Path, seed: int) -> None:
    """Random models, layouts, and up to three deaths, the later ones also while or after the step is resumed."""
    chance = random.Random(seed)
    case = chance.choice(outliving.EXACT)
    workers = chance.randint(2, 5)
    fates: dict[int, list[Any]] = {}
    for worker in chance.sample(range(workers), chance.randint(1, workers - 1)):
        phase = chance.choice(["forward", "backward", "backward", "reduce"])
        fates[worker] = ["enter", chance.choice([STEP, STEP, STEP + 1]), chance.randint(1, 4) if phase != "reduce" else 1, phase, [worker]]
    stages = chance.randint(1, min(workers, 4))
    run(tmp_path, fates, case, workers=workers, stages=stages)
