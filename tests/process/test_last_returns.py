"""Tests how a job ends in which some workers have returned from train_fn and the others cannot."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.agent.last_returns import without_the_rest
from elastic.agent.supervision import WorkerProcess

FAILURE = {"type": "failed", "kind": "JobFailed", "message": "worker 0 fell"}


def members(returned: dict[int, Any], steps: dict[int, int], last: int = 9) -> list[WorkerProcess]:
    found = [WorkerProcess(number=number, step=steps.get(number)) for number in range(3)]
    for number, value in returned.items():
        found[number].result = {"type": "result", "value": value, "valued": value is not None, "stopped": False, "step": last}
    return found


def test_nothing_is_missing_but_the_return_of_the_others() -> None:
    outcome, said = without_the_rest(FAILURE, members({0: "mine", 1: None}, {2: 8}), [9], {"value": "told before"})
    assert outcome == {"type": "done", "value": "mine", "stopped": False}
    assert said.startswith("worker 0 fell. All steps were done, and workers [0, 1] have returned from train_fn")
    assert said.endswith("although workers [2] have not returned")


def test_the_value_that_the_first_member_has_told_counts_if_it_cannot_return() -> None:
    outcome, said = without_the_rest(FAILURE, members({1: None}, {}), [], {"value": "told"})
    assert outcome["value"] == "told"
    assert "The job's value" not in said


def test_without_the_first_members_value_that_of_the_next_one_counts() -> None:
    outcome, said = without_the_rest(FAILURE, members({1: "next", 2: "last"}, {0: 9}), [], {})
    assert outcome == {"type": "done", "value": "next", "stopped": False}
    assert said.endswith("have not returned. The job's value is that of worker 1, since worker 0 cannot tell its own")


def test_without_any_value_the_job_has_failed() -> None:
    outcome, said = without_the_rest(FAILURE, members({1: None, 2: None}, {0: 9}), [], {})
    assert (outcome["type"], said) == ("failed", "")
    assert "workers [1, 2] have returned, but the value of the job is that of worker 0" in outcome["message"]


@pytest.mark.parametrize(("steps", "seen"), [({2: 10}, []), ({}, [10])])
def test_who_returned_while_another_takes_steps_has_not_ended_the_training(steps: dict[int, int], seen: list[int]) -> None:
    assert without_the_rest(FAILURE, members({0: "x"}, steps), seen, {}) == (FAILURE, "")


def test_without_a_step_nobody_knows() -> None:
    found = members({0: "x"}, {})
    found[0].result = {"type": "result", "value": "x", "valued": True, "stopped": False, "step": None}
    assert without_the_rest(FAILURE, found, [], {}) == (FAILURE, "")
