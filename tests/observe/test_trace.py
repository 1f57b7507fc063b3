"""Traces: the files of workers, and the JSON for Perfetto."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from elastic.host.rundir import RunDirectory
from elastic.observe import trace, trace_file
from elastic.observe.incident import Incident
from elastic.observe.json_lines import append_lines
from elastic.observe.trace_file import TraceFile, records


def checked(text: str) -> list[dict[str, Any]]:
    """The events of a trace, if it has the form that Perfetto reads: spans of a track lie in each other, or apart."""
    found = json.loads(text)["traceEvents"]
    open_: dict[tuple[int, int], list[float]] = {}
    for event in found:
        assert {"ph", "name", "pid", "tid"} <= event.keys(), event
        assert event["ph"] in ("X", "M", "i")
        if event["ph"] == "M":
            assert isinstance(event["args"], dict)
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            ends = open_.setdefault((event["pid"], event["tid"]), [])
            while ends and ends[-1] <= event["ts"] + 0.002:
                ends.pop()
            end = event["ts"] + event["dur"]
            assert event["dur"] >= 0
            assert not ends or end <= ends[-1] + 0.002, event
            ends.append(end)
    return found


def test_a_step_becomes_spans(tmp_path):
    directory = RunDirectory(tmp_path)
    file = TraceFile(directory.trace, 3)
    for phase, micro_batch in (("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1), ("backward", 0), ("reduce", -1)):
        file.phase(phase, 7, 2, micro_batch)
    file.waits(1)
    file.waits(None)
    for phase in ("ready", "apply", "gather", "idle"):
        file.phase(phase, 7, 2)
    file.mark("transfers", 1.0, 2.0, received_bytes=5)
    found = Incident(kind="death", at=100.0, worker=1, step=7, detected_ms=1.0, phases_ms={"quiesce": 2.0, "commit": 3.0}, running_ms=9.0)
    append_lines(directory.incidents, [found.to_json()])
    trace.write(directory, tmp_path / "trace.json")
    events = checked((tmp_path / "trace.json").read_text())
    names = [event["name"] for event in events if event["ph"] == "X" and event["tid"] == 1]
    assert names[:6] == ["forward 0", "forward 1", "backward, input 0", "backward 1", "backward, weights 0", "reduce"]
    assert names[6:] == ["ready", "apply", "gather"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    assert spans["step 7"]["args"] == {"epoch": 2}
    assert spans["waits for worker 1"]["pid"] == 3
    assert (spans["transfers"]["dur"], spans["transfers"]["args"]) == (1e6, {"received_bytes": 5})
    assert (spans["death, step 7"]["dur"], spans["commit"]["dur"]) == (9000, 3000)
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"worker 3", "incidents"}


def test_a_killed_worker_loses_no_record(tmp_path):
    pid = os.fork()
    if pid == 0:
        file = TraceFile(tmp_path, 0)
        for step in range(20_000):
            file.phase("forward", step, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [record[3] for record in records(tmp_path / "0")] == [*range(20_000)]


def test_a_full_trace_ends_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_file, "MOST", trace_file._CHUNK)
    monkeypatch.setattr(trace, "MOST", trace_file._CHUNK)
    file = TraceFile(tmp_path, 0)
    for step in range(1 << 15):
        file.phase("forward", step, 1)
    events = [*trace.worker_events(0, tmp_path / "0")]
    assert events[-1]["name"] == "the trace is full"
    assert sum(event["ph"] == "X" and event["tid"] == 1 for event in events) == (1 << 14) - 1


def test_a_trace_that_cannot_be_written_disturbs_nothing(tmp_path):
    file = TraceFile(tmp_path / "missing" / "trace", 0)
    file.phase("forward", 0, 1)
    file.mark("transfers", 0.0, 1.0)
