"""What can be seen of a real job while it runs, and afterwards."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import elastic
from elastic.agent import record as recording
from elastic.agent.record import JobRecord
from elastic.cli.main import app
from elastic.host.channel import Channel
from elastic.host.rundir import RunDirectory
from elastic.observe import jobs
from elastic.observe.journal import LinesReader
from elastic.observe.page import page
from tests.observe.test_journal import step
from tests.observe.test_page import live, worker
from tests.observe.test_trace import checked
from tests.process import seen_job

pytestmark = pytest.mark.usefixtures("leftovers")


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 0, done.output
    return done.output


class Recorded(elastic.Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_step(self, report: elastic.Report) -> None:
        self.calls.append(report.step)

    def on_incident(self, incident: Any) -> None:
        self.calls.append(incident.kind)

    def on_layout(self, view: Any) -> None:
        self.calls.append((view.epoch, len(view.workers)))


@pytest.mark.slow
def test_a_job_that_loses_a_worker_is_seen(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    mine, trace, report = Recorded(), tmp_path / "trace.json", tmp_path / "run.html"
    seeing = {"callbacks": [mine], "trace": trace, "report": report, "metrics_port": 0}
    result = elastic.run(seen_job.train, workers=2, args=[6, 3], directory=directory.path, name="seen", respawn=False, **seeing)
    assert [each["kind"] for each in result.incidents] == ["death"]
    assert [call for call in mine.calls if isinstance(call, int)] == [*range(6)], "each step once, though one is taken again"
    assert [call for call in mine.calls if not isinstance(call, int)] == [(1, 2), (2, 1), "death"]

    lines = LinesReader(directory.steps).read()
    assert [line["step"] for line in lines] == [*range(6)], "each step once, though one is taken again"
    assert all(line["loss"] > 0 and line["seconds"] > 0 for line in lines)
    assert lines[-1]["memory"] > 1 << 20

    events = [json.loads(line) for line in shown("events", str(directory.path), "--json").splitlines()]
    assert [event["kind"] for event in events] == ["begun", "view", "said", "view", "incident", "ended"]
    assert events[4]["incident"] == result.incidents[0]
    assert "worker 1 (place 1) died in step 3" in shown("events", str(directory.path))
    assert "done" in shown("events", str(directory.path), "--follow").splitlines()[-1], "it has ended, so nothing is waited for"

    output = shown("logs", str(directory.path)).splitlines()
    assert output[0] == "[0-1] every worker begins (2 times)"
    assert [line[6:] for line in output[1:]] == [f"step {number} is done" for number in range(6)]
    assert shown("logs", str(directory.path), "1") == "[1]   every worker begins\n"
    assert "worker 9 has printed nothing, or the job" in shown("logs", str(directory.path), "9")

    phases = {event["name"].partition(" ")[0] for event in checked(trace.read_text()) if event["pid"] == 1 and event["ph"] == "X"}
    assert phases >= {"step", "forward", "backward", "reduce", "ready", "apply", "gather"}, "also those of the worker that was killed"
    assert "death, step 3" in report.read_text()
    assert report.read_text() == page(directory)
    assert "seen: has ended" in shown("top", str(directory.path), "--once")

    live = json.loads(directory.live.read_text())
    assert (live["job"], live["step"], live["epoch"]) == ("seen", 5, 2)
    assert [worker["worker"] for worker in live["workers"]] == [0]
    assert not directory.running


def test_a_program_that_does_not_read_delays_nothing_and_is_told_what_it_has_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "_UNREAD", 1000)
    ours, theirs = socket.socketpair()
    with theirs, closing(Channel(ours)) as launcher:
        ours.setblocking(False)  # as an agent does
        start: Any = SimpleNamespace(watches=True, settings=SimpleNamespace(name="mine"))
        record = JobRecord(start, RunDirectory(tmp_path), launcher)
        for number in range(5000):
            record.heard(0, {"type": "steps", "rows": [step(number).to_row()]})
        assert launcher.waiting < 2000
        assert len(LinesReader(tmp_path / "steps.jsonl").read()) == 5000, "the file has all"
        reading, seen = Channel(theirs), list[Any]()
        while launcher.unsent:
            seen += reading.receive()
            launcher.flush()
        record.heard(0, {"type": "steps", "rows": [step(5000).to_row()]})
        while not seen[-1]["dropped"]:
            seen += reading.receive()
        steps = [message["rows"][0][0] for message in seen]
        assert steps == [*range(len(steps) - 1), 5000]
        assert seen[-1]["dropped"] == 5000 - (len(steps) - 1)


def test_steps_of_a_coordinator_that_is_lost_are_not_told_again(tmp_path):
    ours, theirs = socket.socketpair()
    with theirs, closing(Channel(ours)) as launcher:
        start: Any = SimpleNamespace(watches=True, settings=SimpleNamespace(name="mine"))
        record = JobRecord(start, RunDirectory(tmp_path), launcher)
        record.take_over(time.monotonic())
        now = time.time()
        record.heard(0, {"type": "steps", "rows": [step(0, at=now - 60).to_row(), step(1, at=now).to_row(), step(2, at=now).to_row()]})
        assert [row[0] for message in Channel(theirs).receive() for row in message["rows"]] == [1, 2]
        assert [line["step"] for line in LinesReader(tmp_path / "steps.jsonl").read()] == [0, 1, 2]


def test_a_job_that_is_not_there_is_one_line():
    done = CliRunner().invoke(app, ["events", "nowhere"])
    assert done.exit_code == 1
    assert "'nowhere' is no run directory, and no job of that name runs" in done.stderr


@pytest.mark.parametrize("words", [("top", "--once"), ("events",), ("logs",), ("report",)], ids=lambda words: words[0])
def test_of_several_jobs_of_one_name_none_is_shown_silently(words, leftovers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [RunDirectory(leftovers.directory / f"elastic-{letter}") for letter in "bca"]

    def look() -> Any:
        return CliRunner().invoke(app, [words[0], "mine", *words[1:]])

    with ExitStack() as all_run, ExitStack() as first_runs:
        for at, directory in enumerate(places):
            (first_runs if at == 0 else all_run).enter_context(directory.prepared())
            directory.write_live({**live(worker(0)), "job": "mine"})
            directory.events.write_text(json.dumps({"at": 86400.0 * (at + 1), "kind": "begun", "job": "mine", "pid": 1}) + "\n")
        done = look()
        assert done.exit_code == 1
        first, *listed = done.stderr.splitlines()
        assert first == "error: 3 jobs of the name 'mine' run on this host: give the run directory of one instead"
        assert [line.split()[:2] for line in listed] == [[str(each.path), "(began"] for each in reversed(places)], "the newest first"
        all_run.close()
        only = look()
        assert (only.exit_code, only.stderr) == (0, "")
        assert jobs.find("mine").path == places[0].path
    for directory in places:
        directory.clear()
    newest = look()
    assert newest.exit_code == 0
    assert newest.stderr.startswith(f"3 jobs of the name 'mine' have ended: this is the newest, {places[2].path} (began 1970-01-0")
    assert newest.stderr.count("\n") == 1
    assert jobs.find("mine").path == places[2].path
    for directory in places:
        directory.remove()


def test_a_running_job_is_found_by_its_name(tmp_path, leftovers):
    directory = RunDirectory(leftovers.directory / "elastic-abc")
    with directory.prepared():
        directory.write_live({"job": "mine"})
        assert jobs.find("mine").path == directory.path
        assert directory.running
    assert not directory.running
    directory.remove()


@pytest.mark.parametrize("terminal", [None, "dumb"])
def test_an_output_that_cannot_be_drawn_anew_gets_one_picture(terminal, tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)
    if terminal is not None:
        monkeypatch.setenv("TERM", terminal)
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with directory.prepared():
        directory.write_live({**live(worker(0)), "job": "mine"})
        done = CliRunner().invoke(app, ["top", str(tmp_path)])
    assert done.exit_code == 0
    assert done.stderr == "elastic top: this output cannot be drawn anew, so the job is shown once\n"
    assert "mine" in done.stdout
