"""Tests that a plan puts no more on a device than it has, and that what it counts is what a device holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import elastic
from elastic.errors import PlanError
from tests.device.processes import python

MODULE = "tests.device.trainings"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("layout", ["1x1", "3x2", "4x2"])
def test_the_prediction_is_what_a_device_holds_at_its_peak(layout: str) -> None:
    """Replicas are predicted for the worker that keeps most of them. What a layer holds besides activations is not predicted."""
    done = python("from tests.device.trainings import peaks; peaks()", layout)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(0.9 * each["peak"] <= each["predicted"] <= 1.3 * each["peak"] for each in found), found
    assert all(0.9 * each["replicas"] <= each["predicted_replicas"] for each in found), found
    assert all(0.9 * each["copies"] <= each["predicted_copies"] <= 1.6 * each["copies"] for each in found), found


def plan_of(tmp_path: Path, **options: object) -> list[int]:
    """Returns the number of layers of each stage that two workers train."""
    return elastic.run(f"{MODULE}:wide", device="fake", workers=2, directory=tmp_path / "run", rebalance=False, **options).value  # pyright: ignore


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_layers_are_spread_until_they_fit_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six layers of 1 MiB, with Adam: 38 MB on each device in one stage, 28 MB in two."""
    monkeypatch.setenv("FAKE_DEVICE_BYTES", str(37_000_000))
    assert plan_of(tmp_path) == [3, 3]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_too_little_device_memory_is_an_error_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_DEVICE_BYTES", str(28_000_000))
    with pytest.raises(
        PlanError, match=r"needs [\d.]+ MB of device memory on worker \d, which is \d+ bytes more than the [\d.]+ MB"
    ) as caught:
        plan_of(tmp_path)
    assert "Use devices with more memory" in str(caught.value)
