"""Tests when a fault is due, with fake steps and clocks."""

from __future__ import annotations

import pytest

from elastic.chaos.faults import parse
from elastic.chaos.trigger import StepPace, Trigger
from elastic.observe.activity import Doing


def doing(at_step: str, epoch: int = 1, at: float = 0.0) -> Doing:
    """Such as `8:reduce`."""
    step, _, phase = at_step.partition(":")
    return Doing(worker=0, pid=1, phase=phase or "forward", step=int(step), epoch=epoch, at=at)


def trigger(fault: str, **state: int | bool) -> Trigger:
    return Trigger(fault=parse(fault), fraction=0.5, **state)  # pyright: ignore[reportArgumentType]


def first_due(subject: Trigger, *seen: str | tuple[str, int]) -> str | None:
    """The first of these at which it is due; with the epoch of the view where that is not 1."""
    for each in seen:
        text, epoch = each if isinstance(each, tuple) else (each, 1)
        if subject.due(doing(text, epoch), epoch, 0.0, 0.0):
            return text
    return None


@pytest.mark.parametrize(
    ("fault", "seen", "hit"),
    [
        ("1@8", ["7:replicate", "8:idle", "8:forward"], "8:forward"),
        ("1@8:reduce", ["7:reduce", "8:forward", "8:backward", "8:reduce"], "8:reduce"),
        ("1@8:reduce", ["8:forward", "8:apply", "9:idle", "9:backward"], "9:backward"),
        ("1@8:reduce", ["8:backward", "8:quiesce", "8:commit"], None),
        ("1@8", ["30:gather"], "30:gather"),
        ("1@0:forward", ["-1:idle", "0:gather", "0:forward"], "0:forward"),
    ],
)
def test_a_fault_of_a_step_is_due_in_its_phase_or_in_the_next_that_is_seen_later(fault: str, seen: list[str], hit: str | None) -> None:
    assert first_due(trigger(fault), *seen) == hit


def test_a_fault_without_a_phase_is_due_at_a_fraction_of_a_step() -> None:
    subject = trigger("1@8")
    began = doing("8:gather", at=100.0)
    assert not subject.due(began, 1, 100.01, 0.2)
    assert not subject.due(doing("8:backward", at=100.08), 1, 100.09, 0.2)
    assert subject.due(doing("8:reduce", at=100.09), 1, 100.1, 0.2)
    assert subject.due(doing("9:gather", at=100.05), 1, 100.05, 0.2), "a step that is shorter than usual is over"


def test_a_worker_that_is_behind_its_view_or_ahead_of_it_waits() -> None:
    subject = trigger("1@8")
    assert not subject.due(doing("8:forward", epoch=1), 2, 0.0, 0.0)
    assert not subject.due(doing("8:forward", epoch=3), 2, 0.0, 0.0)
    assert subject.due(doing("8:forward", epoch=2), 2, 0.0, 0.0)


def test_the_next_fault_of_a_step_is_for_the_view_behind_the_one_before() -> None:
    subject = trigger("0@8", struck=1, reached=8)
    assert first_due(subject, "8:forward", "9:forward", "8:migrate", ("8:gather", 2)) == "8:gather"


@pytest.mark.parametrize(
    ("fault", "state", "seen", "hit"),
    [
        ("0@8:migrate", {}, ["3:migrate", "4:forward", "8:forward", "8:quiesce", "8:migrate"], "8:migrate"),
        ("0@8:migrate", {"struck": 1, "reached": 8}, ["7:forward", "7:quiesce", "7:propose", "7:migrate"], "7:migrate"),
        ("0@8:propose", {"struck": 1, "reached": 8}, ["8:forward", "8:quiesce", "8:migrate"], "8:migrate"),
        ("0@8:propose", {"struck": 1, "reached": 8}, ["8:gate"], "8:gate"),
        ("0@8:gate", {"struck": 1, "reached": 8}, ["8:backward", "8:quiesce", ("8:gather", 2)], "8:gather"),
        ("0@8:gate", {}, ["7:forward", "8:forward", "20:forward", ("20:apply", 2)], "20:apply"),
        ("0@20:gate", {"struck": 1, "reached": 8}, ["8:gate", ("8:forward", 2), ("20:forward", 2), ("20:gate", 2)], "20:gate"),
        ("2@8:quiesce", {"struck": 1, "reached": 8, "mid_recovery": True}, ["8:gate", "8:commit", "8:quiesce"], "8:quiesce"),
        ("2@8:propose", {"struck": 1, "reached": 8, "mid_recovery": True}, ["8:gate", "8:quiesce", "8:migrate"], "8:migrate"),
        ("2@8:gate", {"struck": 1, "reached": 8, "mid_recovery": True}, ["8:migrate", ("8:gather", 2)], "8:gather"),
    ],
)
def test_a_fault_of_a_recovery_is_due_in_the_first_one_after_its_step(fault, state, seen, hit) -> None:
    assert first_due(trigger(fault, **state), *seen) == hit


def test_it_looks_more_often_when_the_step_is_near() -> None:
    subject = trigger("1@8")
    pauses = []
    for step in range(5, 9):
        subject.due(doing(f"{step}:idle"), 1, 0.0, 0.0)
        pauses.append(subject.pause_s)
    assert pauses == [0.005, 0.005, 0.0005, 0.0005]


def test_a_fault_whose_place_is_missing_is_passed_when_its_step_is() -> None:
    subject = trigger("7@8", struck=1)
    assert not subject.passed(doing("9:forward"), 1)
    assert not subject.passed(doing("8:forward", 2), 2)
    assert not subject.passed(doing("9:idle", 2), 2)
    assert subject.passed(doing("9:forward", 2), 2)


def test_the_pace_is_the_median_of_steps_that_nothing_interrupted() -> None:
    pace = StepPace()
    assert pace.step_s == 0.0
    for text, epoch, at in [
        ("3:forward", 1, 1.0),
        ("3:apply", 1, 1.1),
        ("4:forward", 1, 1.2),
        ("6:forward", 1, 1.8),
        ("6:quiesce", 1, 1.9),
        ("6:gather", 2, 9.0),
        ("7:gather", 2, 9.4),
        ("6:gather", 3, 20.0),
    ]:
        pace.see(doing(text, epoch, at))
    assert pace.step_s == pytest.approx(0.3)
