"""Tests real jobs in which a bit flips where no check of memory at rest sees it: copies differ, which is found and undone."""

from __future__ import annotations

import functools
from typing import Any

import pytest

import elastic
from elastic.errors import StateUnproven
from tests.recovery import flipping

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

STEPS, STEP = 9, 5


@functools.cache
def calm(case: str, steps: int) -> Any:
    return elastic.run(flipping.train, args=[case, steps, {}], workers=1).value


def run(flips: dict[str, list[list[Any]]], *, case: str = "adamw", steps: int = STEPS, every: int = 1, **options: Any) -> Any:
    """Runs a job and checks its parameters; the losses that its loops were given, and the steps whose losses are other ones, are added."""
    options = {"workers": 3, "stages": 1, **options}
    result = elastic.run(flipping.train, args=[case, steps, flips, every], rebalance=False, respawn=False, **options)
    expected = calm(case, steps)
    assert result.value["digest"] == expected["digest"]
    assert len(result.value["losses"]) == steps
    for worker, due in flips.items():
        assert result.value["flipped"][int(worker)] == len([flip for flip in due if flip[2] != "kill"]), "a flip has not happened"
    assert {each["restored"] for each in result.incidents} <= {None}
    return result


def other_losses(result: Any, case: str = "adamw") -> list[int]:
    losses = result.value["losses"]
    return [step for step, (one, other) in enumerate(zip(losses, calm(case, len(losses))["losses"], strict=True)) if one != other]


UNDECIDED = [
    ("ready", "live", "param", STEP),
    ("ready", "live", "exp_avg_sq", STEP),
    ("apply", "live", "param", STEP),
    ("apply", "live", "exp_avg", STEP),
    ("gather", "live", "param", STEP),
    ("gather", "live", "exp_avg", STEP),
    ("sent", "live", "exp_avg_sq", STEP),
    ("gather", "total", "exp_avg", STEP),
    ("ready", "replica", "param", STEP - 1),
    ("ready", "replica", "exp_avg", STEP - 1),
]
"""A moment of step 5, what changes then, in which state that shows, and as of which step."""

BRIEF = [UNDECIDED[1], UNDECIDED[2], UNDECIDED[9]]


@pytest.mark.usefixtures("without_segments")
@pytest.mark.parametrize(
    ("phase", "what", "state", "step"), [pytest.param(*row, marks=[] if row in BRIEF else [pytest.mark.long]) for row in UNDECIDED]
)
def test_an_owner_and_a_replica_that_differ_go_back_to_the_state_in_which_they_were_equal(
    phase: str, what: str, state: str, step: int
) -> None:
    """The owner is not believed because it is the owner, nor is the replica."""
    result = run({"1": [[phase, STEP, what, state]]})
    (incident,) = result.incidents
    found = incident["findings"][0]
    assert (incident["kind"], incident["worker"], incident["step"]) == ("damage", None, step + 2)
    assert incident["went_back_to"] == 0, "the newest state that was kept"
    assert {each["state"] for each in incident["findings"]} >= {state}
    assert {(each["worker"], each["step"], each["good"]) for each in incident["findings"]} == {(None, step, step - 1)}
    owner, replica = (1, 2) if what != "replica" else (0, 1)
    (one, first), (other, second) = found["digests"].items()
    assert one.startswith(f"owner worker {owner} (host ")
    assert other.startswith(f"replica worker {replica} (host ")
    assert first != second
    assert found["parameters"]
    assert found["start"] <= 7 < found["stop"]
    assert f"as of step {step} (of " in incident["why"]
    assert f"it was right after step {step - 1}" in incident["why"]
    polluted = [STEP + 1] if what == "live" and phase in ("ready", "apply", "gather") and state == "param" else []
    assert set(other_losses(result)) <= {*polluted, STEP + 1}, "only what was computed with the changed bit"


@pytest.mark.usefixtures("without_segments")
def test_parameters_are_decided_by_the_members_that_gathered_them() -> None:
    """The owner is wrong in the one case, a member in the other; nobody takes another step."""
    result = run({"1": [["sent", STEP, "live", "param"]], "2": [["arrival", 2, "gathered", "first"]]})
    one, other = result.incidents
    for incident, worker, step, copy in ((one, 2, 3, "the gathered"), (other, 1, STEP + 1, "its own")):
        (found,) = incident["findings"]
        assert (incident["kind"], incident["worker"], incident["step"], incident["steps_redone"]) == ("damage", worker, step, 1)
        assert (found["worker"], found["state"], found["step"], found["good"]) == (worker, "param", step - 1, step - 2)
        assert (found["copy"], found["start"] <= 7 < found["stop"] or copy == "the gathered") == (copy, True)
        assert incident["went_back_to"] is None
        assert "a copy is not what most other workers have" in incident["why"]
    assert other_losses(result) == []


@pytest.mark.parametrize("worker", [0, 1])
def test_two_workers_of_which_neither_is_believed_take_the_step_again(worker: int) -> None:
    """On one host there are no replicas: both go back to the previous copies."""
    result = run({str(worker): [["arrival", STEP, "gathered", "first"]]}, workers=2)
    (incident,) = result.incidents
    assert (incident["kind"], incident["worker"], incident["step"], incident["steps_redone"]) == ("damage", None, STEP + 1, 2)
    assert incident["went_back_to"] == STEP - 1
    assert {(each["worker"], each["step"], each["good"]) for each in incident["findings"]} == {(None, STEP, STEP - 1)}
    assert other_losses(result) == []


@pytest.mark.usefixtures("without_segments")
@pytest.mark.parametrize(
    "case", [pytest.param("batchnorm"), *(pytest.param(case, marks=pytest.mark.long) for case in flipping.trainings.CASES)]
)
def test_settings_and_buffers_go_back_with_the_state(case: str) -> None:
    """Schedulers, running statistics, tied parameters, whole tensors; with stages, and back to a later state than the first."""
    state = {"momentum, bf16 autocast": "momentum_buffer", "initial state": "sum", "whole tensors, tied": "param"}.get(case, "exp_avg")
    result = run({"0": [["ready", 13, "live", state]]}, case=case, steps=17, workers=4, stages=2)
    (incident,) = result.incidents
    assert (incident["kind"], incident["worker"], incident["went_back_to"]) == ("damage", None, 10)


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_where_layers_take_turns_it_is_found_at_the_next_comparison_of_all() -> None:
    result = run({"1": [["forward", 47, "live", "exp_avg_sq"]]}, steps=54, every=1000, workers=2)
    (incident,) = result.incidents
    assert (incident["kind"], incident["step"], incident["went_back_to"]) == ("damage", 52, 0)
    assert {each["good"] for each in incident["findings"]} == {0}


@pytest.mark.usefixtures("without_segments")
def test_a_worker_that_dies_while_all_go_back() -> None:
    """Then nothing shows what was right, and there is no checkpoint."""
    flips = {"1": [["ready", STEP, "live", "exp_avg"], ["quiesce", -1, "kill", ""]]}
    with pytest.raises(StateUnproven, match="No state of step 4 or before, which was the same in all copies, is complete in memory"):
        run(flips)


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_an_update_that_is_wrong_again_and_again_ends_the_job() -> None:
    flips = {"1": [["ready", STEP, "live", "exp_avg"]] * 3}
    with pytest.raises(elastic.errors.TrainerError, match="wrong 3 times within 10 steps; the last: copies of the state differ"):
        run(flips, steps=30)
