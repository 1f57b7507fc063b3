"""The files of events and steps."""

from __future__ import annotations

import json

from elastic.observe import incident
from elastic.observe.incident import Incident
from elastic.observe.journal import Journal, LinesReader, shown
from elastic.observe.records import Records
from elastic.observe.step_log import Step, StepLog, finite


def step(number: int, **more) -> Step:
    fields = {"at": 1.0, "loss": float(number), "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5, "samples": 8, "tokens": 0, "epoch": 1}
    return Step(**{"step": number, **fields, "workers": 2, "layout": "[0-1]x2", "of": 10**6, **more})


def test_nothing_is_written_before_something_is_worth_keeping(tmp_path):
    path = tmp_path / "events.jsonl"
    journal = Journal(path, clock=lambda: 5.0)
    journal.note("begun", job="a", pid=1)
    journal.said("worker 0 died before training began")
    assert not path.exists()
    journal.note("view", epoch=1, layout="[0-1]x2", workers=[0, 1])
    assert [event["kind"] for event in LinesReader(path).read()] == ["begun", "said", "view"]


def test_an_incident_is_not_written_again_when_its_text_is_printed(tmp_path):
    journal, found = Journal(tmp_path / "events.jsonl"), Incident(kind="death", worker=1, step=3)
    journal.incident(found)
    journal.said(incident.timeline(found))
    journal.said("etcd answers again")
    events = LinesReader(tmp_path / "events.jsonl").read()
    assert [event["kind"] for event in events] == ["incident", "said"]
    assert "worker 1 died in step 3" in shown(events[0])
    assert Incident.from_json(events[0]["incident"]) == found


def test_records_that_cannot_be_written_disturb_nothing_and_are_told_once(tmp_path, monkeypatch):
    """The sentence is itself an event, which cannot be written either."""
    said: list[str] = []
    journal, log = Journal(tmp_path / "missing" / "events.jsonl"), StepLog(tmp_path / "missing" / "steps.jsonl")
    monkeypatch.setattr("elastic.observe.records.own", Records())
    monkeypatch.setattr("elastic.observe.console.say", lambda sentence: (said.append(sentence), journal.said(sentence)))
    journal.incident(Incident(kind="join"))
    assert log.new([step(0)]) == [step(0)]
    assert len(said) == 1
    assert said[0].startswith("records of this run cannot be written any more, and will lack what happens now: ")


def test_a_reader_takes_only_complete_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    reader = LinesReader(path)
    assert reader.read() == []
    path.write_text('{"kind": "a"}\nnot json\n{"kind"')
    assert reader.read() == [{"kind": "a"}]
    with path.open("a") as file:
        file.write(': "b"}\n')
    assert reader.read() == [{"kind": "b"}]


def test_a_reader_goes_on_at_a_place_and_reads_a_part_at_a_time(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("".join(f'{{"number": {number}}}\n' for number in range(100)))
    found, place = list[int](), 0
    while (reader := LinesReader(path, place, most=50)).read():
        found += [line["number"] for line in LinesReader(path, place, most=50).read()]
        place = reader.place
    assert found == [*range(100)]
    path.write_text('{"text": "' + "x" * 100 + '"}\n{"number": 1}\n')
    reader = LinesReader(path, most=50)
    assert [line for _ in range(5) for line in reader.read()] == [{"number": 1}], "a line that is too long is left out"


def test_a_step_that_is_taken_again_is_written_once(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    assert log.new([step(0), step(1)]) == [step(0), step(1)]
    assert log.new([step(1), step(2)]) == [step(2)]
    assert [line["step"] for line in LinesReader(tmp_path / "steps.jsonl").read()] == [0, 1, 2]


def test_a_long_run_writes_fewer_lines_that_are_means_of_their_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("elastic.observe.step_log.LINES", 100)
    log = StepLog(tmp_path / "steps.jsonl")
    log.new([step(number) for number in range(200)])
    lines = LinesReader(tmp_path / "steps.jsonl").read()
    assert len(lines) == 100 + 50
    assert lines[-1]["step"] == 199
    assert lines[-1]["loss"] == (199 + 198) / 2


def test_a_loss_that_is_no_number_is_valid_json(tmp_path):
    log = StepLog(tmp_path / "steps.jsonl")
    log.new([step(0, loss=finite(float("nan")), seconds=finite(float("inf")))])
    (line,) = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: 1 / 0)["loss"] is None
    assert step(0, seconds=None).samples_per_second == 0.0
    assert Step.from_row(step(4).to_row()) == step(4)
