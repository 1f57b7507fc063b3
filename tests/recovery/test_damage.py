"""Tests real jobs in which a bit of memory is flipped: the error names its holder, and the result equals an undisturbed job's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.errors import StateUnproven, TrainerError
from tests.recovery import damaging, trainings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

CASE = next(iter(trainings.CASES))
STEPS = 17


def run(flips: dict[str, list[list[Any]]], *, steps: int = STEPS, every: int = 1, **options: Any) -> Any:
    return elastic.run(damaging.train, args=[CASE, steps, flips, every], rebalance=False, respawn=False, **options)


@pytest.fixture(scope="module")
def calm() -> Any:
    return run({}, workers=1).value


@pytest.mark.usefixtures("without_segments")
def test_one_bit_in_each_kind_of_copy_changes_nothing(calm: Any, tmp_path: Path) -> None:
    """An owner's parameter and optimizer state, a gathered parameter, a replica; at last a spare that is needed, since another one dies."""
    flips = {
        "0": [["forward", 5, "live", "param"], ["backward", 10, "replica", "exp_avg"], ["apply", 15, "kill", ""]],
        "1": [["forward", 3, "live", "exp_avg_sq"], ["backward", 8, "gathered", "param"], ["gather", 15, "previous", "exp_avg"]],
    }
    result = run(flips, workers=3, stages=1, directory=tmp_path / "run")
    assert result.value == calm
    *damages, death = result.incidents
    assert [(each["kind"], each["worker"], each["step"]) for each in damages] == [
        ("damage", 1, 3),
        ("damage", 0, 5),
        ("damage", 1, 8),
        ("damage", 0, 10),
    ]
    changed = ("its own exp_avg_sq", "its own param", "the gathered param", "the replica of another worker's exp_avg")
    for each, what in zip([*damages, death], [*changed, "the previous copy of its own exp_avg"], strict=True):
        worker = 1 if each is death else each["worker"]
        assert f"worker {worker} (host " in each["why"]
        assert f"memory at rest has changed: {what} of layer " in each["why"]
        assert ", run [" in each["why"]
        assert ", as of step " in each["why"]
        assert ("after_step" in each["why"]) is (what in ("its own param", "the gathered param"))
    assert (death["kind"], death["worker"]) == ("death", 0)


@pytest.mark.long
def test_stages_hand_damage_on_and_nothing_of_that_step_is_kept(calm: Any) -> None:
    flips = {"0": [["backward", 4, "live", "param"]], "3": [["backward", 9, "live", "param"]]}
    result = run(flips, workers=4, stages=2)
    assert result.value == calm
    assert [(each["kind"], each["worker"], each["micro_batches_kept"]) for each in result.incidents] == [("damage", 0, 0), ("damage", 3, 0)]


@pytest.mark.long
def test_a_worker_whose_own_memory_changed_goes_back_to_its_previous_copy(calm: Any) -> None:
    """There are no replicas: on one host state lies in segments."""
    flips = {"0": [["forward", 5, "live", "param"]], "1": [["forward", 3, "live", "exp_avg_sq"], ["backward", 8, "gathered", "param"]]}
    result = run(flips, workers=3, stages=1)
    assert result.value == calm
    assert [(each["kind"], each["worker"], each["step"]) for each in result.incidents] == [
        ("damage", 1, 3),
        ("damage", 0, 5),
        ("damage", 1, 8),
    ]


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_survivors_whose_copies_contradict_each_other_go_on_from_neither(calm: Any) -> None:
    """The previous copy of worker 1 is not what worker 2 keeps of it, and worker 0 takes what it had kept of an older state with it.

    Worker 2 may have the next state of its replica by then, or not.
    """
    flips = {"2": [["forward", 6, "wrong replica", "exp_avg"]], "0": [["reduce", 6, "kill", ""]]}
    with pytest.raises(StateUnproven, match=r"of step 4 has digest \w+ on worker 1 \(previous\) and \w+ on worker 2 \(.*replica\)"):
        run(flips, workers=3, stages=1)


@pytest.mark.long
def test_parameters_that_change_again_and_again_are_not_chance() -> None:
    flips = {str(worker): [["forward", step, "live", "param"] for step in range(3, 9)] for worker in range(2)}
    said = (
        r"memory was found to be wrong 3 times within 10 steps; .*the loop body changes parameters in place .*after_step.* or the memory of"
    )
    with pytest.raises(TrainerError, match=said):
        run(flips, workers=2, stages=1)
