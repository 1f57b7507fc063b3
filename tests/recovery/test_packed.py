"""Tests real jobs with several dtypes in a layer, and with frozen packed weights, that lose workers, change their layout, or go on from
checkpoints: no bit differs, and what is not trained is moved only to workers that lack it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.checkpoint.directory import newest
from elastic.checkpoint.store import LocalStore
from tests.engine import packed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

MODULE = "tests.recovery.packed"
STEPS = 8
SHORT = "packed"


def run(folder: Path, case: str, fates: dict[str, list[Any]], steps: int = STEPS, saved: Path | None = None, **options: Any) -> Any:
    options = {"workers": 4, "stages": 2, **options}
    saves = None if saved is None else {"checkpoint": str(saved)}
    return elastic.run(f"{MODULE}:train", args=[str(folder), case, steps, fates, saves], rebalance=False, **options)


@functools.cache
def calm(case: str) -> dict[str, Any]:
    """Returns the value of one worker that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), case, {}, workers=1, stages=1).value


def check(result: elastic.JobResult, case: str) -> None:
    assert result.value == calm(case)
    assert "death" in {found["kind"] for found in result.incidents}
    for incident in result.incidents:
        if incident["epoch"] is not None:
            assert incident["samples_lost"] == 0
            assert incident["restored"] is None
            assert incident["bytes_moved"] == incident["bytes_minimum"]


@pytest.mark.parametrize("fate", [["enter", 4, 1, "apply", [1, 3]], ["enter", 0, 1, "forward", [1]], ["body", 3, 1, [0, 1, 2, 3]]])
@pytest.mark.parametrize("case", sorted(packed.CASES))
@pytest.mark.long
def test_deaths_and_joins(case: str, fate: list[Any], tmp_path: Path) -> None:
    check(run(tmp_path, case, {"1": fate}), case)


@pytest.mark.parametrize("what", ["live", "previous"])
@pytest.mark.long
def test_what_a_faulty_worker_has_scribbled_over_is_not_taken(what: str, tmp_path: Path) -> None:
    """Where it is not trained, one memory is the copy of all steps."""
    check(run(tmp_path, SHORT, {"1": ["scribble", 4, 1, what]}), SHORT)


def test_a_whole_stage_dies_in_an_update(tmp_path: Path) -> None:
    check(run(tmp_path, SHORT, {"1": ["enter", 4, 1, "apply", [0, 1]]}), SHORT)


@pytest.mark.parametrize("case", sorted(packed.CASES))
@pytest.mark.long
def test_replicas(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without segments, where a stage has one member its frozen weights are in replicas too."""
    monkeypatch.setenv("ELASTIC_SEGMENTS", "0")
    check(run(tmp_path, case, {"1": ["enter", 4, 1, "backward", None], "2": ["enter", 6, 1, "apply", None]}, workers=3, stages=3), case)


@pytest.mark.parametrize("case", sorted(packed.CASES))
@pytest.mark.long
def test_checkpoints(case: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    run(tmp_path, case, {}, 5, saved, workers=3, stages=2)
    source = newest(LocalStore(saved), verify=True)
    assert source is not None
    if case.startswith("packed"):
        dtypes = {name: states["param"].dtype for name, states in source.contents.tensors.items() if name.startswith("1.")}
        assert (dtypes["1.codes"], dtypes["1.offset"], dtypes["1.back"]) == ("uint8", "int8", "float8_e4m3fn")
        assert {"1.codes", "1.scales", "1.back"} <= source.contents.frozen
        assert source.contents.buffers >= {"1.offset"}
    assert run(tmp_path, case, {}, STEPS, saved, workers=2, stages=1).value == calm(case)


@pytest.mark.long
def test_on_a_device(tmp_path: Path) -> None:
    module, fates = "tests.device.packed", {"1": ["enter", 3, 1, "apply", [0, 1, 2]]}
    result = elastic.run(
        f"{module}:train", args=[str(tmp_path), SHORT, STEPS, fates, None], workers=3, stages=2, device="fake", rebalance=False
    )
    with tempfile.TemporaryDirectory() as folder:
        alone = elastic.run(f"{module}:train", args=[folder, SHORT, STEPS, {}, None], workers=1, device="fake")
    assert result.value == alone.value
