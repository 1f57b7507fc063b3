"""Tests the soak: its schedules follow from their numbers, and cover what they should; a run that was interrupted goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import soak
from elastic.chaos.kinds import KINDS
from elastic.chaos.oracles import judge
from elastic.chaos.schedule import Schedule
from elastic.chaos.trial import Record
from tests.chaos.evidence import fine


def test_the_schedules_cover_kinds_hosts_layouts_and_checkpoints():
    schedules = [soak.schedule_of(number) for number in range(200)]
    assert schedules[7] == soak.schedule_of(7)
    assert {len(each.injections) for each in schedules} == {5}
    assert {fault.kind for each in schedules for fault in each.injections} == set(KINDS)
    jobs = [each.job for each in schedules]
    assert {job.hosts for job in jobs} == {1, 2, 3}
    assert {bool(job.checkpoint_every) for job in jobs} == {True, False}
    assert len({(job.workers, job.stages) for job in jobs}) > 5


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[Schedule] = []

    def run(schedule: Schedule) -> Record:
        ran.append(schedule)
        known = fine(schedule=schedule, stuck="it stood still" if len(ran) == 2 else None)
        return Record(evidence=known, findings=judge(known), harness_cpu_s=0.0)

    monkeypatch.setattr(soak.trial, "run", run)
    monkeypatch.setattr(soak.reference, "reference", lambda *_: None)
    app = soak.typer.Typer()
    app.command()(soak.main)
    first = CliRunner().invoke(app, ["--count", "2", "--folder", str(tmp_path)])
    assert first.exit_code == 1, first.output
    second = CliRunner().invoke(app, ["--count", "4", "--folder", str(tmp_path)])
    assert second.exit_code == 1
    assert ran == [soak.schedule_of(number) for number in range(4)]
    summary = json.loads((tmp_path / "summary.json").read_text())["schedules"]
    assert [row["verdict"] for row in summary] == ["pass", "fail", "pass", "pass"]
    assert "0001: fail: ended: it stood still" in second.output
    third = CliRunner().invoke(app, ["--count", "4", "--folder", str(tmp_path), "--again"])
    assert third.exit_code == 0, third.output
    assert len(ran) == 5
    old = json.loads((tmp_path / "0002.json").read_text())
    (tmp_path / "0002.json").write_text(json.dumps({**old, "schedule": soak.schedule_of(9).to_json()}))
    assert CliRunner().invoke(app, ["--count", "4", "--folder", str(tmp_path)]).exit_code == 0
    assert ran[5:] == [soak.schedule_of(2)], "a report of another version's schedule does not count"


def test_sigterm_ends_it_like_ctrl_c_so_that_namespaces_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cleaned = []

    def run(schedule: Schedule) -> Record:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(schedule.seed)
        raise AssertionError("it went on")

    monkeypatch.setattr(soak.trial, "run", run)
    monkeypatch.setattr(soak.reference, "reference", lambda *_: None)
    app = soak.typer.Typer()
    app.command()(soak.main)
    assert CliRunner().invoke(app, ["--count", "2", "--folder", str(tmp_path)]).exit_code == 143
    assert (cleaned, [each.name for each in tmp_path.iterdir()]) == ([0], [])
