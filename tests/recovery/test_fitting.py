"""Tests jobs whose model does not fit into the memory of fewer workers than they have."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import elastic
from elastic.errors import PlanError
from tests.recovery import large

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]

# Three workers need 3.7 times their parameters each, two need 5.5 times half of all. A process takes 0.25 to 0.4 GB before.
MEMORY = int(6.2 * large.BYTES)


@functools.cache
def undisturbed() -> str:
    return elastic.run(large.train, args=[[]], workers=1).value


@pytest.mark.parametrize("killed", [[1], [0, 2], [0, 1, 2]], ids=["one", "two", "all"])
def test_what_does_not_fit_on_the_others_continues_when_new_workers_are_there(killed: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    result = elastic.run(large.train, args=[killed], workers=3, memory=MEMORY, rebalance=False)
    assert result.value == undisturbed()
    said = capfd.readouterr().err
    assert ("paused until new workers are ready" in said) == (len(killed) < 3)
    assert [incident["samples_lost"] for incident in result.incidents] == [0]


def test_without_new_workers_the_job_ends_and_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"2 workers left, and the model does not fit .* needs .*; none can be started \(respawn is off\)"):
        elastic.run(large.train, args=[[1]], workers=3, memory=MEMORY, respawn=False, directory=tmp_path / "run")
