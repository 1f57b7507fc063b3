"""Tests what a job and the checkpoint it resumes from must have in common, and the messages if they differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from elastic.errors import CheckpointError
from elastic.worker.resume_checks import TrainingRecord, changed_values, check_same_training, matched_groups

SETTINGS = {"batch_size": 8, "micro_batch_size": 2, "seed": 1, "samples": 32}
RECORD = TrainingRecord(optimizer="AdamW", scheduler="StepLR", initial="ab", settings=SETTINGS, group_values=[{"lr": "0.1"}, {"lr": "0.2"}])


def test_a_record_comes_back_from_json() -> None:
    assert TrainingRecord.from_json(RECORD.to_json()) == RECORD
    assert check_same_training("step-3", TrainingRecord.from_json({}), RECORD) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"settings": {**SETTINGS, "samples": 48}}, "was trained with samples=32, but this job has 48: samples come in another order"),
        ({"settings": {**SETTINGS, "batch_size": 16}}, "batch_size=8, but this job has 16: every step has other samples"),
        ({"settings": {**SETTINGS, "micro_batch_size": 4}}, "micro_batch_size=2, but this job has 4"),
        ({"settings": {**SETTINGS, "seed": 2}}, "seed=1, but this job has 2"),
        ({"scheduler": ""}, "trained with the scheduler StepLR, but this job has none"),
        ({"initial": "cd"}, "began with other initial parameters"),
    ],
)
def test_what_may_differ_is_told(change: dict[str, Any], said: str) -> None:
    told = check_same_training("step-3", RECORD, replace(RECORD, **change))
    assert [said in sentence for sentence in told] == [True] * bool(said)


def test_settings_of_groups_that_the_script_changed_are_told() -> None:
    own = replace(RECORD, group_values=[{"lr": "0.2"}, {"lr": "0.3"}, {"lr": "0.4"}])
    (told,) = changed_values("step-3", RECORD, own, [1, 0, None])
    assert told.startswith("lr of parameter group 1 was 0.1 in the script that began step-3 and is 0.3 in this one: the saved value")
    assert changed_values("step-3", TrainingRecord(), own, [1, 0, None]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": "SGD"}, "trained with AdamW, but this job has SGD.*own"),
        ({"scheduler": "CosineAnnealingLR"}, "scheduler StepLR, but this job has CosineAnnealingLR"),
        ({"initial": "cd", "settings": {**SETTINGS, "seed": 2}}, "belongs to another training: .* its own directory"),
    ],
)
def test_what_may_not_differ_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        check_same_training("step-3", RECORD, replace(RECORD, **change))


@pytest.mark.parametrize(
    ("saved", "own", "frozen", "found"),
    [
        (["ab", "cd"], ["ab", "cd"], "", [0, 1]),
        (["ab", "cd"], ["cd", "ab"], "", [1, 0]),
        (["ab"], ["b"], "a", [0]),  # frozen since
        (["b"], ["ab"], "", [0]),  # trained again
        (["ab"], ["ab", "cd"], "", [0, None]),  # a whole group is trained again
        (["ab", "cd"], ["cd"], "ab", [1]),
    ],
)
def test_groups_are_found_by_their_parameters(saved: list[str], own: list[str], frozen: str, found: list[int | None]) -> None:
    assert matched_groups("step-3", saved, own, frozen) == found


@pytest.mark.parametrize(
    ("saved", "own", "said"),
    [
        (["abcd"], ["ab", "cd"], r"1 parameter group \(a, b, c and 1 more\), and this one has 2; parameter group 1 \(c, d\)"),
        (["ab", "cd"], ["abcd"], "2 parameter groups .* this one has 1; parameter group 0"),
        (["ab", "cd"], ["ac", "bd"], "parameter group 0"),
        (["ab", "cd"], ["ab"], "2 parameter groups"),
    ],
)
def test_parameters_that_are_grouped_otherwise_are_refused(saved: list[str], own: list[str], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        matched_groups("step-3", saved, own, "")
