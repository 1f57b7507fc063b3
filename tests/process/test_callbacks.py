"""Callbacks, loggers, the progress bar, and their arguments."""

from __future__ import annotations

import io
import math
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import elastic
from elastic.errors import SettingsError
from elastic.launch import callbacks as called
from elastic.launch.bar import Bar, on_terminal
from elastic.launch.callbacks import Audience, Called
from elastic.launch.loggers import logger_of
from elastic.launch.seeing import Seeing, address_of
from elastic.observe.incident import Incident
from tests.observe.test_journal import step

VIEW: dict[str, Any] = {
    "what": "view",
    "epoch": 3,
    "layout": "[0-1]x2",
    "workers": [0, 2],
    "leader": 0,
    "stages": [{"start": 0, "stop": 2, "workers": [0, 2]}],
    "hosts": {"0": "a", "2": "b"},
}
INCIDENT = {"what": "incident", "incident": Incident(kind="death", stall_ms=7.0).to_json()}


def steps(*numbers: int, **more: Any) -> dict[str, Any]:
    return {"what": "steps", "rows": [step(number, **more).to_row() for number in numbers]}


class Recorded(elastic.Callback):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_step(self, report: Any) -> None:
        self.calls.append(report.step)
        if report.step == 1:
            raise ValueError("in the callback")

    def on_incident(self, incident: Any) -> None:
        self.calls.append(incident.kind)

    def on_layout(self, view: Any) -> None:
        self.calls.append((view.epoch, view.stages[0].workers, view.hosts["2"]))


def test_callbacks_are_called_in_order_and_one_that_raises_is_told_of_once(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(called, "say", said.append)
    mine = Recorded()
    audience = Audience([("the callback Recorded", Called(mine))])
    for message in (VIEW, steps(0, 1, 2), INCIDENT, steps(1, 3)):
        audience.put(message)
    audience.close()
    assert mine.calls == [(3, (0, 2), "b"), 0, 1, 2, "death", 1, 3]
    assert said == [
        "the callback Recorded raised ValueError: in the callback. The training goes on; later errors of this kind are not reported"
    ]


def test_a_callback_that_hangs_delays_nothing_and_is_told_of(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(called, "say", said.append)
    monkeypatch.setattr(called, "_WAITING", 2)
    monkeypatch.setattr(called, "_LAST_S", 0.05)
    go = threading.Event()
    audience = Audience([("it", SimpleNamespace(seen=lambda _: go.wait(), close=lambda: None))])
    for _ in range(5):
        audience.put(VIEW)
    audience.close()
    go.set()
    assert [sentence.partition(":")[0] for sentence in said] == [
        "callbacks and loggers are so slow that they miss steps; the training is not affected",
        "callbacks and loggers have not ended 0 s after the job",
    ]


def test_a_report_has_nan_for_what_is_no_number():
    report = called.report_of(step(4, loss=None, seconds=0.5, samples=8))
    assert math.isnan(report.loss)
    assert (report.step, report.samples_per_second, report.leader) == (4, 16.0, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"callbacks": [print]}, "a callback is an object with some of the methods on_step, on_incident, on_layout"),
        ({"callbacks": [Recorded]}, "such as an instance of a subclass of elastic.Callback"),
        ({"report": "/nowhere/run.html"}, "report='/nowhere/run.html': there is no directory /nowhere"),
        ({"trace": "/tmp"}, "trace='/tmp': this user cannot write such a file"),
        ({"metrics_port": "localhost"}, "metrics_port='localhost': use a port, or ADDRESS:PORT"),
        ({"metrics_port": 1 << 16}, "use a port"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_starts(arguments, said):
    with pytest.raises(SettingsError, match=said):
        elastic.run("module:train", workers=1, **arguments)


def test_a_file_that_this_user_may_not_write_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setattr("elastic.launch.seeing.os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(SettingsError, match=r"run\.html': this user cannot write such a file"):
        elastic.run("module:train", workers=1, report=tmp_path / "run.html")


@pytest.mark.parametrize(("port", "found"), [(9400, ("127.0.0.1", 9400)), ("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:9", ("::1", 9))])
def test_metrics_are_for_this_host_alone_unless_an_address_is_given(port, found):
    assert address_of(port) == found


@pytest.mark.parametrize("log", ["tensorboard", "wandb:", "csv:file"])
def test_a_logger_that_is_none_is_refused(log):
    with pytest.raises(SettingsError, match="use tensorboard:DIRECTORY, wandb:PROJECT"):
        logger_of(log, "job")


@pytest.mark.parametrize("log", ["tensorboard:runs", "wandb:project", "mlflow:mine", "otel:training"])
def test_a_missing_package_is_one_error_before_the_first_step(log, monkeypatch):
    for name in ("tensorboard.compat.proto.event_pb2", "wandb", "mlflow", "opentelemetry.sdk.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    kind = log.partition(":")[0]
    with (
        pytest.raises(SettingsError, match=rf"log='{log}' needs the package {kind}, .*: pip install "),
        Seeing(log=log).opened(
            "job",
            SimpleNamespace(),  # type: ignore[arg-type]
        ),
    ):
        pass


def test_a_step_is_logged_once_with_its_values_and_the_run_is_ended(monkeypatch):
    written: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: written.append((step, values)), finish=lambda: written.append("finished"))
    wandb = ModuleType("wandb")
    wandb.init = lambda **options: written.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    audience = Audience([("the logger", Called(logger_of("wandb:project/first", "job")))])
    for message in (steps(0, tokens=8), INCIDENT):
        audience.put(message)
    audience.close()
    values = {"loss": 0.0, "lr": 0.1, "grad_norm": 1.0, "samples_per_second": 16.0, "tokens_per_second": 16.0, "workers": 2, "epoch": 1}
    assert written == [{"project": "project", "name": "first"}, (0, values), (0, {"incidents": 1, "stall_ms": 7.0}), "finished"]


def test_in_a_job_of_several_hosts_a_run_is_made_only_where_something_is_logged(monkeypatch):
    made: list[str] = []
    wandb = ModuleType("wandb")
    wandb.init = lambda **_: made.append("run") or SimpleNamespace(log=lambda *_, **__: None, finish=lambda: made.append("end"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    seeing = Seeing(log="wandb:project", progress=False, shared=True)
    for message in (None, steps(0)):
        with seeing.opened("job", SimpleNamespace()) as audience:  # type: ignore[arg-type]
            if message is not None:
                audience.put(message)
        assert made == ([] if message is None else ["run", "end"])


def test_tensorboard_reads_what_is_written(tmp_path):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first in (0, 2):  # the second job continues from a checkpoint after step 1, and takes steps 2 and 3 again
        logger = Called(logger_of(f"tensorboard:{tmp_path}", "job"))
        for number in range(first, 4):
            logger.seen(steps(number))
        logger.close()
    events = reading.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(number, float(number)) for number in range(4)]


def test_an_incident_is_a_span_with_its_phases(monkeypatch):
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    found = Incident(kind="death", at=time.monotonic(), step=3, detected_ms=1.0, phases_ms={"quiesce": 2.0, "commit": 4.0}, running_ms=9.0)
    Called(logger_of("otel:training", "job")).seen({"what": "incident", "incident": found.to_json()})
    quiesce, commit, whole = memory.get_finished_spans()
    assert (whole.name, whole.attributes["elastic.step"], whole.end_time - whole.start_time) == ("incident: death", 3, 9_000_000)
    assert (quiesce.start_time - whole.start_time, commit.end_time - commit.start_time) == (1_000_000, 4_000_000)
    assert {quiesce.parent.span_id, commit.parent.span_id} == {whole.context.span_id}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_one_line_that_is_drawn_over_four_times_a_second_at_most(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, now = Terminal(), iter([0.0, 0.1, 0.3, 0.4])
    bar = Bar(stream, lambda: next(now))
    for number in range(3):
        bar.seen(steps(number, of=4))
    bar.close()
    first, *drawn = stream.getvalue().split("\r\x1b[2K")
    assert (first, len(drawn)) == ("", 3)
    assert drawn[0].startswith("1/4")
    assert drawn[2].startswith("3/4")
    assert "loss 2.0000  16.0 samples/s  2 workers  [0-1]x2  0:00:00 left" in drawn[2]
    assert drawn[2].endswith("\n")
    assert not any("\n" in line for line in drawn[:2])


def test_a_bar_whose_characters_the_stream_cannot_show_fits_into_its_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    raw = io.BytesIO()
    bar = Bar(io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"), lambda: 0.0)
    bar.seen(steps(0, of=4))
    line = raw.getvalue().split(b"\r\x1b[2K")[1]
    assert b"?" in line
    assert len(line) <= 40


def test_there_is_no_bar_where_there_is_no_terminal(monkeypatch):
    assert not on_terminal(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not on_terminal(Terminal())
