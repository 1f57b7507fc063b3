"""Tests real jobs in which a bit flips where no check of memory at rest sees it: copies differ, which is found and undone."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest

import elastic
from elastic.errors import NothingSaved, StateUnproven
from elastic.settings import SEGMENTS
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
        if not any(flip[2] == "kill" for flip in due):  # a dead worker does not tell
            assert result.value["flipped"][int(worker)] == len(due), "a flip has not happened"
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

BRIEF = [UNDECIDED[2]]


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
    assert (incident["kind"], incident["worker"], incident["step"]) == ("damage", None, step + 1)
    assert incident["went_back_to"] == step - 1, "the newest state that was compared: previous copies are still there"
    assert {each["state"] for each in incident["findings"]} >= {state}
    seen = {(each["worker"], each["step"], each["good"]) for each in incident["findings"]}
    spoilt = (1, step - 1, step - 1)  # the previous copy, if the bit flipped before that was made: it is not used
    assert seen - {spoilt} == {(None, step, step - 1)}
    owner, replica = (1, 2) if what != "replica" else (0, 1)
    digests = {who.partition(" (host ")[0]: digest for who, digest in found["digests"].items()}
    assert digests[f"owner worker {owner}"] != digests[f"replica worker {replica}"]
    assert found["parameters"]
    assert found["start"] <= 7 < found["stop"]
    assert f"as of step {step} (of " in incident["why"]
    assert f"it was right after step {step - 1}" in incident["why"]
    polluted = [STEP + 1] if what == "live" and phase in ("ready", "apply", "gather") and state == "param" else []
    assert set(other_losses(result)) <= {*polluted, STEP + 1}, "only what was computed with the changed bit"


@pytest.mark.long
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


@pytest.mark.long
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
@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) for case in ("batchnorm", *flipping.trainings.CASES)])
def test_settings_and_buffers_go_back_with_the_state(case: str) -> None:
    """Schedulers, running statistics, tied parameters, whole tensors; with stages."""
    state = {"momentum, bf16 autocast": "momentum_buffer", "initial state": "sum", "whole tensors, tied": "param"}.get(case, "exp_avg")
    result = run({"0": [["ready", 13, "live", state]]}, case=case, steps=17, workers=4, stages=2)
    (incident,) = result.incidents
    assert (incident["kind"], incident["worker"], incident["went_back_to"]) == ("damage", None, 12)


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_a_previous_copy_that_was_wrong_when_it_was_made_is_not_used() -> None:
    """The bit flips between READY and the previous copy: that of the replica is right."""
    result = run({"1": [["apply", 11, "live", "exp_avg"]]}, steps=17)
    (incident,) = result.incidents
    assert (incident["kind"], incident["step"], incident["went_back_to"]) == ("damage", 12, 10)


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
@pytest.mark.parametrize("case", ["adamw", "batchnorm"])
def test_where_layers_take_turns_it_is_found_at_the_next_comparison_of_all(case: str) -> None:
    """All go back to the copy that was kept, with its settings and running statistics."""
    result = run({"1": [["forward", 47, "live", "exp_avg_sq"]]}, case=case, steps=54, every=1000, workers=2)
    (incident,) = result.incidents
    assert (incident["kind"], incident["step"], incident["went_back_to"]) == ("damage", 51, 0)
    assert {each["good"] for each in incident["findings"]} == {0}


@pytest.mark.usefixtures("without_segments")
def test_what_a_view_begins_with_is_digested_though_layers_take_turns() -> None:
    """All may go back to it. A bit that flipped in its first step was in the copy that is kept, and the step was wrong again and again."""
    result = run({"1": [["forward", 0, "live", "param"]]}, every=1000)
    (incident,) = result.incidents
    assert (incident["kind"], incident["worker"], incident["step"]) == ("damage", 1, 0)
    assert other_losses(result) == []


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_a_worker_that_dies_while_all_go_back() -> None:
    """The previous copy of its replica is there, and was the same."""
    result = run({"1": [["ready", STEP, "live", "exp_avg"], ["quiesce", -1, "kill", ""]]})
    (incident,) = result.incidents
    assert (incident["kind"], incident["went_back_to"]) == ("damage", STEP - 1)


def without_replica(step: int) -> dict[str, list[list[Any]]]:
    """The owner whose copy changes dies while all go back, with the holder of its replica."""
    return {"1": [["ready", step, "live", "exp_avg"], ["quiesce", -1, "kill", ""]], "2": [["quiesce", -1, "kill", ""]]}


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_two_workers_that_die_while_all_go_back() -> None:
    """Then nothing shows what was right, and there is no checkpoint."""
    with pytest.raises(StateUnproven, match="No state of step 4 or before, which was the same in all copies, is complete in memory"):
        run(without_replica(STEP))


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
@pytest.mark.parametrize(("every", "step", "restored"), [(4, 7, "step-00000004"), (6, STEP, None)])
def test_what_is_not_in_memory_is_read_from_a_checkpoint_of_before(tmp_path: Path, every: int, step: int, restored: str | None) -> None:
    """A step whose copies differ is never saved: its checkpoint would be committed behind the comparison."""
    arguments = ["adamw", STEPS, without_replica(step), 1, {"checkpoint": str(tmp_path / "saved"), "every": every}]
    options = {"workers": 3, "stages": 1, "rebalance": False, "respawn": False}
    if restored is None:
        with pytest.raises(NothingSaved, match="no good checkpoint has been saved yet"):
            elastic.run(flipping.train, args=arguments, **options)
        return
    result = elastic.run(flipping.train, args=arguments, **options)
    assert result.value["digest"] == calm("adamw", STEPS)["digest"]
    (incident,) = result.incidents
    assert (incident["kind"], incident["restored"][: len(restored)]) == ("damage", restored)


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_an_update_that_is_wrong_again_and_again_ends_the_job() -> None:
    flips = {"1": [["ready", STEP, "live", "exp_avg"]] * 3}
    with pytest.raises(elastic.errors.TrainerError, match="wrong 3 times within 10 steps; the last: copies of the state differ"):
        run(flips, steps=30)


@pytest.mark.parametrize("segments", [True, pytest.param(False, marks=pytest.mark.long)])
def test_numbers_and_running_statistics_are_checked_at_rest(segments: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step count of a parameter is read from the previous copy, running statistics are from their own."""
    if not segments:
        monkeypatch.setenv(SEGMENTS, "0")
    flips = {"1": [["backward", 3, "scalar", "step"]], "0": [["forward", STEP, "running", ""]]}
    result = run(flips, case="batchnorm", workers=2)
    one, other = result.incidents
    for incident, worker, step, state in ((one, 1, 3, "step of "), (other, 0, STEP, "buffer ")):
        found = incident["findings"][0]
        assert (incident["kind"], incident["worker"], incident["step"], found["worker"]) == ("damage", worker, step, worker)
        assert found["state"].startswith(state)
        assert (found["step"], found["good"], incident["went_back_to"]) == (step - 1, step - 1, None)
    assert other_losses(result, "batchnorm") == []


@pytest.mark.long
def test_a_checkpoint_is_given_up_if_its_memory_changed_while_it_was_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The next one is good."""
    saves = {"checkpoint": str(tmp_path / "saved"), "every": 4}
    result = elastic.run(
        flipping.train, args=["adamw", STEPS, {"1": [["saving", 3, "previous", "exp_avg"]]}, 1, saves], workers=2, stages=1
    )
    assert result.value["digest"] == calm("adamw", STEPS)["digest"]
    assert result.value["flipped"] == [0, 1]
    said = capfd.readouterr().err
    assert "on worker 1, memory has changed while nothing wrote to it: exp_avg of layer 4, run [" in said
    assert "worker 1 could not write its part" in said
    saved = sorted(path.name for path in (tmp_path / "saved").iterdir() if path.is_dir())
    assert [name for name in saved if "00000004" in name] == []
    assert [name for name in saved if "00000008" in name]


@pytest.mark.long
@pytest.mark.usefixtures("without_segments")
def test_a_loss_that_is_not_finite_is_not_blamed_on_the_training_if_copies_differ() -> None:
    result = run({"1": [["gather", STEP, "huge", "param"]]})
    (incident,) = result.incidents
    assert (incident["kind"], incident["worker"], incident["step"], incident["went_back_to"]) == ("damage", None, STEP + 1, STEP - 1)
    assert {(each["step"], each["good"]) for each in incident["findings"]} == {(STEP, STEP - 1)}
    assert other_losses(result) == []


PLACES = [("live", "param"), ("live", "exp_avg"), ("live", "exp_avg_sq"), ("gathered", ""), ("replica", "param"), ("replica", "exp_avg")]


@pytest.mark.usefixtures("without_segments")
@pytest.mark.long
@pytest.mark.parametrize("seed", range(16))
def test_random_bits_at_random_moments(seed: int) -> None:
    """Bits of copies that other workers have too, or of which a digest is known, whatever the worker does at that moment."""
    choice = random.Random(seed)
    flips: dict[str, list[list[Any]]] = {}
    for number, step in enumerate((3, 9, 15, 21)):
        flips.setdefault(str(choice.randrange(4)), []).append(["random", step, 100 * seed + number, *choice.choice(PLACES)])
    result = run(flips, steps=30, workers=4, stages=choice.choice([1, 2]))
    assert result.incidents
    assert {each["kind"] for each in result.incidents} <= {"damage", "eviction"}
    found = [each for incident in result.incidents for each in incident["findings"]]
    assert all(each["digests"] and each["good"] < 30 for each in found)
    assert len(other_losses(result)) <= 2 * len(result.incidents)
