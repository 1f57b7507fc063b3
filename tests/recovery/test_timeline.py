"""Tests the figures of a recovery, from fixed times."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.control.events import Vote
from elastic.control.timeline import Timeline, TrainingPace, samples_lost
from elastic.plan.plan import Plan
from elastic.view import View
from tests.recovery.driving import view_of

PACE = TrainingPace(committed=10, at=99.0, step_s=0.4, begun=13)


def timeline(**change: Any) -> Timeline:
    options = {"kind": "death", "before": view_of(range(3)), "fault": 100.0, "detected": 100.001, "pace": PACE, "worker": 1, **change}
    return Timeline(**options)


def proposal(resume: int = 12) -> Any:
    told = {"planned": "", "finished": (1, 3), "yielded": -1, "restore": None}
    return SimpleNamespace(view=view_of((0, 2), 2, 1), resume=resume, bytes_minimum=5, back=None, **told)


def through(line: Timeline, start: float, view: View) -> None:
    """One attempt: a millisecond for each phase."""
    line.opened(start)
    line.inventoried(start + 0.001)
    line.proposed(start + 0.002, proposal())
    for worker in view.workers:
        line.voted(start + 0.004, Vote(worker=worker, received_bytes=3, times={"moved": start + 0.003}))
    line.committed(start + 0.005, view)


def test_the_pace_tells_what_would_have_been() -> None:
    assert PACE.last_commit(100.0) == pytest.approx(99.8), "two steps after the one that was told of"
    assert PACE.remaining(100.0, 13) == pytest.approx(0.2)
    assert PACE.remaining(100.0, 11) == 0.0
    assert TrainingPace(at=99.0).last_commit(100.0) == 99.0
    assert TrainingPace().last_commit(100.0) is None
    assert TrainingPace().remaining(100.0, 3) == 0.0


def test_a_recovery_in_one_attempt() -> None:
    line = timeline()
    view = view_of((0, 2), 2, 1)
    through(line, 100.001, view)
    assert not line.over
    line.resumed(0, 100.007)
    line.first_commit(0, {"at": 100.5, "step": 13, "taken_over_s": 0.03})
    assert not line.settled, "worker 2 has not told that it runs"
    line.resumed(2, 100.008)
    assert line.settled
    assert not line.over, "worker 2 has not told what it did"
    line.first_commit(2, {"at": 100.501, "step": 13, "taken_over_s": 0.2})
    assert line.over
    found = line.incident()
    assert found.detected_ms == pytest.approx(1.0)
    assert found.phases_ms == pytest.approx({"quiesce": 1.0, "propose": 1.0, "migrate": 1.0, "gate": 1.0, "commit": 1.0})
    grains = view.workload.grains
    assert found.micro_batches_kept == 2 * view.workload.micro_batches // grains
    assert found.redo_taken_over_ms == pytest.approx(200.0)
    assert (found.redo_ms, found.stall_ms) == (pytest.approx(492.0), pytest.approx(300.0))
    assert (found.steps_redone, found.lost_ms, found.bytes_moved) == (1, pytest.approx(200.0), 6)
    assert (found.layout_before, found.layout_after) == (view_of(range(3)).plan.summary, view.plan.summary)


def test_phases_are_those_of_the_last_attempt() -> None:
    line = timeline()
    through(line, 100.001, view_of((0, 2), 2, 1))
    line.lost(2)
    line.opened(101.0)
    line.inventoried(101.002)
    found = line.incident()
    assert found.phases_ms == pytest.approx({"quiesce": 2.0})
    assert (found.also, found.epoch, found.bytes_moved, found.stall_ms) == ((2,), None, None, None)


def test_two_steps_are_lost_where_the_last_one_did_not_count() -> None:
    line = timeline()
    line.opened(100.001)
    line.inventoried(100.002)
    line.proposed(100.003, proposal(resume=11))
    found = line.incident()
    assert (found.steps_redone, found.lost_ms) == (2, pytest.approx(600.0))


def test_nothing_is_lost_at_a_boundary() -> None:
    line = timeline(kind="join", worker=None, pace=dataclasses.replace(PACE, begun=None))
    line.proposed(100.1, proposal())
    found = line.incident()
    assert (found.steps_redone, found.lost_ms, found.samples_lost) == (0, 0.0, 0)


def test_samples_are_counted_against_the_batch() -> None:
    view = view_of((0, 1))
    assert samples_lost(view) == 0
    short = Plan(stages=view.plan.stages, routes=tuple(route[:-1] for route in view.plan.routes), step_s=1.0, why="")
    assert samples_lost(dataclasses.replace(view, plan=short)) == 1
