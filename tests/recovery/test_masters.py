"""Tests real jobs with float32 masters that lose workers, change their layout, or go on from checkpoints: no bit differs."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic
from elastic.checkpoint.convert.run import Conversion, convert
from elastic.checkpoint.directory import newest
from elastic.checkpoint.store import LocalStore

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

MODULE = "tests.recovery.mastered"
STEPS = 8
SHORT = "bfloat16, tied, two groups"
ALL = ["bfloat16", SHORT, "bfloat16, average, momentum", "bfloat16, initial state", "bfloat16, whole tensors", "bfloat16 and float32"]
ALL.append("float16, loss scale")


def run(folder: Path, case: str, fates: dict[str, list[Any]], steps: int = STEPS, saved: Path | None = None, **options: Any) -> Any:
    options = {"workers": 4, "stages": 2, **options}
    saves = None if saved is None else {"checkpoint": str(saved)}
    return elastic.run(f"{MODULE}:train", args=[str(folder), case, steps, fates, saves], rebalance=False, **options)


@functools.cache
def calm(case: str, device: str = "cpu") -> dict[str, Any]:
    """Returns the value of one worker that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), case, {}, workers=1, stages=1, device=device).value


def moved(result: elastic.JobResult) -> None:
    """Every incident moved as little as it must, and lost nothing."""
    for incident in result.incidents:
        if incident["epoch"] is not None:
            assert incident["samples_lost"] == 0
            assert incident["restored"] is None
            assert incident["bytes_moved"] == incident["bytes_minimum"]


@pytest.mark.parametrize("fate", [["enter", 4, 1, "apply", [1, 3]], ["enter", 0, 1, "forward", [1]], ["body", 3, 1, [0, 1, 2, 3]]])
@pytest.mark.parametrize("case", ALL)
@pytest.mark.long
def test_deaths_and_joins(case: str, fate: list[Any], tmp_path: Path) -> None:
    result = run(tmp_path, case, {"1": fate})
    assert result.value == calm(case)
    assert {found["kind"] for found in result.incidents} >= {"death"}
    moved(result)


def test_two_deaths_in_an_update(tmp_path: Path) -> None:
    result = run(tmp_path, SHORT, {"1": ["enter", 4, 1, "apply", [1, 3]]})
    assert result.value == calm(SHORT)
    moved(result)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.long
def test_replicas_have_masters(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without segments the state of the dead is in replicas, which were updated by replay."""
    monkeypatch.setenv("ELASTIC_SEGMENTS", "0")
    result = run(tmp_path, case, {"1": ["enter", 4, 1, "backward", None], "2": ["enter", 6, 1, "apply", None]})
    assert result.value == calm(case)
    moved(result)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.long
def test_checkpoints_have_masters(case: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    run(tmp_path, case, {}, 5, saved, workers=3, stages=2)
    source = newest(LocalStore(saved), verify=True)
    assert source is not None
    tensors = source.contents.tensors
    assert {states["fp32_master"].dtype for states in tensors.values() if "fp32_master" in states} == {"float32"}
    assert run(tmp_path, case, {}, STEPS, saved, workers=2, stages=1).value == calm(case)


@pytest.mark.long
def test_on_a_device(tmp_path: Path) -> None:
    module = "tests.device.masters"
    arguments = [str(tmp_path), SHORT, STEPS, {"1": ["enter", 3, 1, "apply", [0, 1, 2]]}, None]
    result = elastic.run(f"{module}:train", args=arguments, workers=3, stages=2, device="fake", rebalance=False)
    with tempfile.TemporaryDirectory() as folder:
        alone = elastic.run(f"{module}:train", args=[folder, SHORT, STEPS, {}, None], workers=1, device="fake")
    assert result.value == alone.value
    assert json.dumps(result.value) != json.dumps(calm("bfloat16"))


def resumed(saved: Path, steps: int, *, masters: bool, workers: int = 2) -> Any:
    return elastic.run(f"{MODULE}:resumes", args=[str(saved), steps, masters], workers=workers, stages=1, rebalance=False).value


@pytest.mark.long
def test_a_checkpoint_without_masters_is_raised_and_one_with_masters_is_rounded(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    before = resumed(first, 3, masters=False)
    assert before["dtypes"] == ["torch.bfloat16"]
    shutil.copytree(first, second)
    raised = resumed(first, 3, masters=True)
    assert (raised["digest"], raised["dtypes"], raised["unlike"], raised["finer"]) == (before["digest"], ["torch.float32"], 0, 0)
    after = resumed(first, 6, masters=True)
    assert after["finer"] > 1000
    assert resumed(second, 6, masters=True, workers=3) == after, "on another layout"
    back = resumed(first, 6, masters=False)
    assert (back["digest"], back["dtypes"]) == (after["digest"], ["torch.bfloat16"])
    assert len(resumed(first, 8, masters=False)["seen"]) == 2


@pytest.mark.long
def test_deepspeed_universal_has_the_masters_and_they_come_back(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    after = resumed(saved, 4, masters=True)
    shutil.copytree(saved, tmp_path / "twin")
    outcome = convert(Conversion(source=saved, target=tmp_path / "universal", to="deepspeed-universal"))
    assert {(each.state, each.spec.dtype) for each in outcome.tensors} == {(s, "float32") for s in ("param", "exp_avg", "exp_avg_sq")}
    fp32 = torch.load(next((tmp_path / "universal" / "zero").glob("*/fp32.pt")), weights_only=True)["param"]
    assert fp32.dtype == torch.float32
    source = newest(LocalStore(saved))
    assert source is not None
    name = next((tmp_path / "universal" / "zero").glob("*/fp32.pt")).parent.name
    assert torch.equal(fp32.reshape(-1), source.read(name, "fp32_master", 0, fp32.numel()))
    convert(Conversion(source=tmp_path / "universal", target=tmp_path / "back", to="elastic"))
    assert resumed(tmp_path / "back", 4, masters=True)["masters"] == after["masters"]
    assert resumed(tmp_path / "back", 6, masters=True)["digest"] == resumed(tmp_path / "twin", 6, masters=True)["digest"]
