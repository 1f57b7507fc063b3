"""Tests that a job equals a plain loop: torch alone for one worker; on any layout and through kills, the same bits as one worker."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import elastic
from tests.recovery import plain_loop

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]


@pytest.fixture(scope="module", params=["adamw", "lars"])
def plainly(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, plain_loop.plain(request.param)


def test_a_plain_loop_and_a_job_do_the_same(plainly: tuple[str, Any]) -> None:
    kind, (losses, state, average) = plainly
    assert 15 < len(losses) < plain_loop.STEPS, "stopped early"
    whole = elastic.run(plain_loop.train, args=[kind, {}], workers=1, rebalance=False).value
    assert list(whole["losses"].values()) == pytest.approx(losses, rel=1e-5)
    for name, tensor in state.items():
        assert torch.tensor(whole["whole"][name]) == pytest.approx(tensor.flatten(), rel=1e-3, abs=1e-5), name
    for name, tensor in average.items():
        assert torch.tensor(whole["average"][name]) == pytest.approx(tensor.flatten(), rel=1e-3, abs=1e-5), name
    assert max(map(abs, whole["whole"]["2.weight"])) == pytest.approx(plain_loop.LIMIT), "something was clamped"

    for workers, stages, kills in [(2, 1, {"1": 6, "0": 13}), (2, 2, {"0": 5, "1": 12}), (3, 2, {"2": 4, "0": 11})]:
        result = elastic.run(plain_loop.train, args=[kind, kills], workers=workers, stages=stages, min_workers=1, rebalance=False)
        deaths: list[Any] = [incident["worker"] for incident in result.incidents if incident["kind"] == "death"]
        assert sorted(deaths) == sorted(map(int, kills)), (workers, stages)
        found = result.value
        assert found["digest"] == whole["digest"], (workers, stages)
        assert found["whole"] == whole["whole"]
        assert found["average"] == whole["average"]
        assert {step: loss for step, loss in whole["losses"].items() if step in found["losses"]} == found["losses"]
