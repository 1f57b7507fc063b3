"""Tests that each value logged by a loop body is in the file once, after any death and any file error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic
from elastic.errors import TrainerError
from elastic.worker.metrics import MetricFiles, Numbers
from tests.process import metrics


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def tell(files: MetricFiles, numbers: Numbers, path: Path, step: int, **values: Any) -> None:
    files.heard(json.loads(json.dumps(numbers.record(path, step, values))))


def test_the_first_that_tells_a_line_has_it_written(tmp_path: Path) -> None:
    path, said = tmp_path / "new" / "m.jsonl", []
    files, one, other, joiner = MetricFiles(said.append), Numbers(), Numbers(), Numbers()
    for step in range(3):
        tell(files, one, path, step, a=1)
        if step == 1:
            tell(files, other, path, 1, a=2)  # late, when the first worker is dead
            tell(files, other, path, 1, b=2)
    tell(files, joiner, path, 2, a=3)
    tell(files, joiner, path, 2, b=3)
    files.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "a": 1},
        {"step": 1, "a": 1},
        {"step": 1, "b": 2},
        {"step": 2, "a": 1},
        {"step": 2, "b": 3},
    ]
    assert not said


def test_lines_of_an_earlier_job_are_replaced_where_steps_are_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'# mine\n{"step": 3}\n{"step": 4}\n{"step": 5}\n[6]\n\xff\n{"ste')
    files, numbers = MetricFiles(pytest.fail), Numbers()
    for step in (4, 5):
        tell(files, numbers, path, step, new=True)
    assert path.read_bytes() == b'# mine\n{"step": 3}\n[6]\n\xff\n{"step": 4, "new": true}\n{"step": 5, "new": true}\n'
    files.close()


def test_a_file_that_cannot_be_written_is_said_once_and_written_later(tmp_path: Path) -> None:
    path, said = tmp_path / "m.jsonl", []
    path.mkdir()
    files, numbers = MetricFiles(said.append), Numbers()
    for step in range(3):
        tell(files, numbers, path, step)
    (complaint,) = said
    assert "Is a directory" in complaint
    assert "the values that step 0 and later ones log are kept" in complaint
    path.rmdir()
    tell(files, numbers, path, 3)
    assert steps(path) == [0, 1, 2, 3]
    files.close()


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"cannot write the values of step 3: .*Tensor.*such as tensor.item\(\)"):
        Numbers().record(tmp_path / "x", 3, {"loss": torch.ones(())})


@pytest.mark.long
@pytest.mark.slow
def test_each_step_is_there_once_whoever_leads(tmp_path: Path, leftovers: Any) -> None:
    saves = {"checkpoint": str(tmp_path / "kept"), "every": 5}
    for _ in range(2):  # the second run finds all steps done
        kills = [3, 6, 9]
        result = elastic.run(metrics.train, args=[str(tmp_path), kills, saves], workers=3, stages=1, rebalance=False, min_workers=2)
        assert steps(tmp_path / "metrics.jsonl") == [step for step in range(metrics.STEPS) for _ in range(2)]
    assert not result.incidents
    assert len(list(tmp_path.glob("died-*"))) == len(kills)
