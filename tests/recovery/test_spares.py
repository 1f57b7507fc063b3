"""Tests spares in real jobs: they join in the view of the loss, with the bits of a calm run, and cost nothing while they wait."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import elastic
from tests.recovery import sparing
from tests.recovery.sparing import KILL, STOP

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS = 16


def run(acts: dict[str, list[Any]], *, pause_s: float = 0.0, evaluates: bool = False, **options: Any) -> Any:
    options = {"workers": 3, "spares": 1, **options}
    return elastic.run(sparing.train, args=[STEPS, acts, pause_s, evaluates], rebalance=False, **options)


@cache
def calm(*, evaluates: bool = False) -> dict[str, Any]:
    value = run({}, workers=1, spares=0, evaluates=evaluates).value
    return {name: value[name] for name in ("digest", "losses")}


def same_bits(result: Any, *, evaluates: bool = False) -> bool:
    """Whether digest and losses are those of a calm run. A leader that has joined has the losses since then."""
    digest, losses = (calm(evaluates=evaluates)[name] for name in ("digest", "losses"))
    found = result.value["losses"]
    return result.value["digest"] == digest and len(found) > 0 and losses[-len(found) :] == found


def test_a_spare_joins_in_the_view_of_the_loss() -> None:
    result = run({"6": [2, [3], KILL, [2]]}, pause_s=0.01)
    assert same_bits(result)
    assert len(result.value["losses"]) == STEPS
    (incident,) = result.incidents
    assert (incident["kind"], incident["worker"], incident["joined"], incident["spares"]) == ("death", 2, [3], [3])
    assert set(result.value["counts"]) == {3}, "the job was smaller for some steps"
    assert result.epoch == 2


@pytest.mark.long
def test_spares_are_replaced_and_join_again_and_again() -> None:
    acts = {"3": [2, [3], KILL, [2]], "6": [3, [4], KILL, [3]], "9": [1, [5], KILL, [4]], "12": [5, [6], KILL, [0]]}
    result = run(acts)
    assert same_bits(result)
    assert [each["joined"] for each in result.incidents] == [[3], [4], [5], [6]]
    assert set(result.value["counts"]) == {3}
    assert result.value["workers"] == [1, 5, 6]


@pytest.mark.long
def test_a_spare_joins_in_the_middle_of_evaluations_on_stages() -> None:
    result = run({"4": [2, [3], KILL, [0]], "8": [1, [4], KILL, [1]]}, evaluates=True, stages=2)
    assert same_bits(result, evaluates=True)
    assert [each["joined"] for each in result.incidents] == [[3], [4]]


@pytest.mark.long
def test_a_job_of_one_worker_goes_on_with_its_spare() -> None:
    result = run({"6": [0, [1], KILL, [0]]}, workers=1)
    assert same_bits(result)
    assert result.value["workers"] == [1]


@pytest.mark.long
def test_two_die_with_one_spare() -> None:
    """The spare joins at once; a new worker and a new spare come later."""
    result = run({"3": [2, [3], KILL, [1, 2]], "12": [0, [5], KILL, [5]]}, pause_s=0.2)
    assert same_bits(result)
    assert result.incidents[0]["joined"] == [3]
    assert [each["kind"] for each in result.incidents] == ["death", "join"]
    assert result.value["counts"][-1] == 3


@pytest.mark.long
def test_all_members_die_with_a_spare() -> None:
    result = run({"6": [1, [3], KILL, [0, 1, 2]]})
    assert same_bits(result)
    assert len(result.value["workers"]) == 3


@pytest.mark.long
def test_a_spare_dies_and_is_replaced() -> None:
    result = run({"3": [2, [3], KILL, [3]], "9": [2, [4], KILL, [1]]})
    assert same_bits(result)
    (incident,) = result.incidents
    assert incident["joined"] == [4]


@pytest.mark.long
def test_a_worker_and_the_spare_die_at_once() -> None:
    result = run({"3": [2, [3], KILL, [3, 1]], "12": [0, [5], KILL, [5]]}, pause_s=0.2)
    assert same_bits(result)
    assert [each["kind"] for each in result.incidents] == ["death", "join"]
    assert result.value["counts"][-1] == 3


@pytest.mark.long
def test_a_stopped_spare_is_not_chosen_and_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    result = run({"3": [2, [3, 4], STOP, [3]], "4": [2, [4], KILL, [2]], "10": [0, [5], KILL, [1]]}, spares=2, pause_s=0.1)
    assert same_bits(result)
    assert [each["joined"] for each in result.incidents] == [[4], [5]]
    assert "worker 3" in capfd.readouterr().err


@pytest.mark.long
def test_a_waiting_spare_uses_no_processor() -> None:
    (used,) = elastic.run(sparing.idle, workers=2, spares=1, args=[2, 8.0]).value["used_s"]
    assert used < 0.08
