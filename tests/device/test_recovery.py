"""Tests jobs on the fake device that lose workers or devices: they end with the bits of an undisturbed job."""

from __future__ import annotations

import functools
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import elastic
from elastic.errors import JobFailed, SettingsError, TrainerError

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

MODULE = "tests.device.trainings"
STEPS = 7


@functools.cache
def calm(case: str) -> dict[str, Any]:
    """Returns the value and the log of one worker that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder, case, STEPS, {}]
        result = elastic.run(f"{MODULE}:train", args=arguments, workers=1, device="fake", directory=Path(folder, "run"))
        return {"value": result.value, "lines": lines_of(Path(folder, "steps-0.jsonl"))}


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def check(tmp_path: Path, result: elastic.JobResult, case: str = "adamw") -> None:
    """The job's value, and what its loops were given, are those of the undisturbed job."""
    expected = calm(case)
    assert result.value == expected["value"]
    given = defaultdict(set)
    for path in tmp_path.glob("steps-*.jsonl"):
        log = lines_of(path)
        first = expected["lines"].index(log[0]) if log else 0
        assert log == expected["lines"][first : first + len(log)], path.stem
        for place, line in enumerate(log, first):
            given[place].add(json.dumps(line))
    assert sorted(given) == list(range(len(expected["lines"])))


def run(tmp_path: Path, fates: dict[int, list[Any]], case: str = "adamw", **options: Any) -> elastic.JobResult:
    options = {"workers": 3, "stages": 2, **options}
    arguments = [str(tmp_path), case, STEPS, {str(worker): fate for worker, fate in fates.items()}]
    result = elastic.run(f"{MODULE}:train", args=arguments, device="fake", directory=tmp_path / "run", rebalance=False, **options)
    check(tmp_path, result, case)
    return result


@pytest.mark.parametrize("victims", [[1], [0, 1, 2]])
@pytest.mark.parametrize("phase", ["forward", "backward", "ready", "apply", "gather"])
def test_any_workers_may_die_in_any_phase(tmp_path: Path, phase: str, victims: list[int]) -> None:
    result = run(tmp_path, {1: ["enter", 3, 1, phase, victims]})
    (incident,) = [found for found in result.incidents if found["kind"] == "death"]
    assert sorted([incident["worker"], *incident["also"]]) == victims


@pytest.mark.parametrize("call", ["overwrites_copy", "has_copy"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_workers_may_die_around_a_copy(tmp_path: Path, call: str, when: str) -> None:
    run(tmp_path, {1: ["call", 3, 1, call, when, None]})


@pytest.mark.parametrize("case", ["batchnorm", "average, momentum", "scheduler, objects, tied", "whole tensors"])
def test_all_state_outlives_the_processes(tmp_path: Path, case: str) -> None:
    run(tmp_path, {1: ["enter", 3, 1, "backward", [0, 1, 2]]}, case)


def test_replicas_on_devices_serve_where_state_does_not_outlive_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_SEGMENTS", "0")
    run(tmp_path, {1: ["enter", 3, 1, "backward", None]})


def test_a_broken_device_is_the_loss_of_its_worker(tmp_path: Path) -> None:
    arguments = [str(tmp_path), STEPS, {"1": 3}]
    result = elastic.run(
        f"{MODULE}:broken", args=arguments, device="fake", directory=tmp_path / "run", workers=3, stages=2, rebalance=False
    )
    check(tmp_path, result)
    assert [found["worker"] for found in result.incidents if found["kind"] == "death"] == [1]


@pytest.mark.parametrize("gone", [False, True])
def test_a_device_that_vanishes_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    """It cannot be used again, so workers that replace the one that it had cannot join: the others go on."""
    calm("adamw")
    monkeypatch.setenv("FAKE_DEVICES_LEFT", str(tmp_path / "left"))
    arguments = [str(tmp_path), STEPS, 3, 2, gone]
    options = {"device": "fake", "directory": tmp_path / "run", "workers": 3, "stages": 2, "rebalance": False}
    result = elastic.run(f"{MODULE}:vanishes", args=arguments, **options)
    check(tmp_path, result)
    assert [found["worker"] for found in result.incidents if found["kind"] == "death"] == [2]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_that_does_not_fit_the_devices_is_not_tried_for_ever(tmp_path: Path, workers: int) -> None:
    """All workers run out of memory in the update, where no micro-batch is to blame."""
    arguments = [str(tmp_path), STEPS, 2]
    with pytest.raises(JobFailed, match="out of memory") as caught:
        elastic.run(f"{MODULE}:full", args=arguments, device="fake", directory=tmp_path / "run", workers=workers, rebalance=False)
    assert workers == 1 or "each time that step 2 was tried, workers ran out of memory" in str(caught.value)


def refused(function: str, kind: type[Exception], *words: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        elastic.run(f"{MODULE}:{function}", **{"workers": 1, "device": "fake", **options})
    for word in words:
        assert word in str(caught.value)


def test_what_cannot_be_trained_is_named_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DEVICES", "2")
    refused("too_large", TrainerError, "1,600,000,000 bytes", "536,870,912")
    refused("apart", TrainerError, "different devices", "0.weight on cpu", "1.weight on fake:0")
    refused("train", SettingsError, "fake:2", "2 of these devices", "workers=", workers=3, args=["", "adamw", 1, {}])
    refused("train", SettingsError, "knows no such device", device="nothing", args=["", "adamw", 1, {}])
    monkeypatch.setenv("FAKE_DEVICES", "4")
    refused("elsewhere", TrainerError, "on fake:3", "computes on fake:0")


@pytest.mark.parametrize(
    ("part", "where"), [("forward", r"layer 1 \(Put\)"), ("backward", r"the backward of layer 1 \(Put\)"), ("loss", "the loss")]
)
def test_an_operation_without_a_deterministic_implementation_is_named(part: str, where: str) -> None:
    says = rf"{where} uses put_, which has no deterministic implementation on fake: .*Use another operation. With Trainer\(exact=False\)"
    with pytest.raises(TrainerError, match=says):
        elastic.run(f"{MODULE}:undetermined", workers=1, args=[part, True], device="fake")


def test_training_goes_on_with_such_an_operation_if_it_need_not_be_exact() -> None:
    assert elastic.run(f"{MODULE}:undetermined", workers=1, args=["forward", False], device="fake").value == [0, 1]


def test_a_step_reports_how_long_it_waited_for_the_copy_of_the_state() -> None:
    """Copies of the fake device run only when something waits for them."""
    each, of_all = elastic.run(f"{MODULE}:waits", workers=1, args=[4], device="fake").value
    assert each[0] == 0.0  # the copy with which the view begins was made before
    assert all(seconds > 0.0 for seconds in each[1:])
    assert sum(each) <= of_all
    assert elastic.run(f"{MODULE}:waits", workers=1, args=[4]).value == [[0.0] * 4, 0.0]


def test_a_step_does_not_wait_for_a_copy_that_is_over() -> None:
    assert elastic.run(f"{MODULE}:waits", workers=1, args=[4, True], device="fake").value == [[0.0] * 4, 0.0]


def test_where_pinning_is_refused_copies_block_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calm("adamw")
    monkeypatch.setenv("FAKE_DEVICE_PINS", "0")
    each, of_all = elastic.run(f"{MODULE}:waits", workers=1, args=[4], device="fake").value
    assert "refuses to pin memory (raise `ulimit -l`)" in capfd.readouterr().err
    assert 0.0 < sum(each) <= of_all
    run(tmp_path, {1: ["enter", 3, 1, "backward", None]})


def test_values_of_files_get_to_the_device(tmp_path: Path) -> None:
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Linear(48, 48))
    save_file(layers.state_dict(), tmp_path / "model.safetensors")
    assert elastic.run(f"{MODULE}:from_files", workers=2, stages=2, args=[str(tmp_path)], device="fake").value == [True] * 4


def test_an_index_is_refused() -> None:
    with pytest.raises(SettingsError, match="without an index"):
        elastic.run("m:f", workers=1, device="cuda:1")


def test_jobs_that_fail_on_every_device_end() -> None:
    with pytest.raises(JobFailed):
        elastic.run(f"{MODULE}:broken", args=["", STEPS, {"0": 0}], workers=1, device="fake", respawn=False)
