"""`elastic.run(log=...)`: callbacks that write metrics for TensorBoard, Weights & Biases or MLflow, or spans for OpenTelemetry."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elastic.errors import SettingsError
from elastic.launch.callbacks import Callback, Called
from elastic.launch.telemetry import OpenTelemetry
from elastic.observe.incident import Incident
from elastic.observe.members import Members
from elastic.worker.report import Report

_FLUSH_S = 1.0


def logger_of(log: str, job: str) -> Callback:
    """Returns the logger that `log` names: `tensorboard:DIRECTORY`, `wandb:PROJECT` or `wandb:PROJECT/RUN`, `mlflow:EXPERIMENT` or
    `mlflow:TRACKING_URI#EXPERIMENT`, `otel:SERVICE`.

    Raises SettingsError: it is none of these, or its package is not installed, or refuses to begin.
    """
    check(log)
    kind, _, where = log.partition(":")
    try:
        return _KINDS[kind](where, job)
    except Exception as error:  # another package, which may raise anything
        raise SettingsError(f"log={log!r}: {kind} cannot begin: {type(error).__name__}: {error}") from error


def check(log: str) -> None:
    """Raises SettingsError if `log` names no logger, or its package cannot be imported."""
    kind, _, where = log.partition(":")
    if kind not in _KINDS or not where:
        forms = "tensorboard:DIRECTORY, wandb:PROJECT[/RUN], mlflow:[URI#]EXPERIMENT or otel:SERVICE"
        raise SettingsError(f"log={log!r}: use {forms}")
    modules, package = _MODULES[kind]
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"log={log!r} needs the package {kind}, which cannot be imported ({error}): pip install {package}, or leave log= out"
        ) from error


class Lazy:
    """A logger that is made when there is something to log: in a job of several hosts only one of them logs."""

    def __init__(self, make: Callable[[], Callback]) -> None:
        self._make = make
        self._made: Called | None = None

    def seen(self, message: Mapping[str, Any]) -> None:
        self._made = self._made or Called(self._make())
        self._made.seen(message)

    def close(self) -> None:
        if self._made is not None:
            self._made.close()


def values_of(report: Report) -> dict[str, float]:
    """Returns the metrics of a step by name."""
    rate = {"tokens_per_second": report.tokens_per_second} if report.tokens_per_second else {}
    used = {} if report.mfu is None else {"mfu": report.mfu}
    common = {"loss": report.loss, "lr": report.lr, "grad_norm": report.grad_norm, "samples_per_second": report.samples_per_second}
    return {**common, **rate, **used, "workers": report.workers, "epoch": report.epoch}


class _Logger(Callback):
    """Writes values as of steps."""

    def __init__(self) -> None:
        self._incidents, self._step = 0, 0

    def on_step(self, report: Report) -> None:
        self._step = report.step
        self.write(report.step, values_of(report))

    def on_incident(self, incident: Incident) -> None:
        self._incidents += 1
        stall = {} if incident.stall_ms is None else {"stall_ms": incident.stall_ms}
        self.write(self._step, {"incidents": self._incidents, **stall})

    def on_layout(self, view: Members) -> None:
        """The number of workers and the epoch are written with each step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        raise NotImplementedError


class TensorBoard(_Logger):
    """Writes an event file into a directory. A job that continues from a checkpoint replaces the steps that it takes again."""

    def __init__(self, where: str, job: str) -> None:
        super().__init__()
        events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event, self._session = events.Event, events.SessionLog
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        Path(where).mkdir(parents=True, exist_ok=True)
        self._writer, self._begun = writer.EventFileWriter(where, flush_secs=5), False

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self._begun:
            self._begun = True
            self._writer.add_event(self._event(wall_time=time.time(), step=step, session_log=self._session(status=self._session.START)))
        parts = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=parts)))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(_Logger):
    """Writes to a run of a project."""

    def __init__(self, where: str, job: str) -> None:
        super().__init__()
        project, _, run = where.partition("/")
        self._run = importlib.import_module("wandb").init(project=project, name=run or job)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(_Logger):
    """Writes to a run of an experiment, once a second."""

    def __init__(self, where: str, job: str) -> None:
        super().__init__()
        uri, _, experiment = where.rpartition("#")
        self._mlflow = importlib.import_module("mlflow")
        self._metric = importlib.import_module("mlflow.entities").Metric
        if uri:
            self._mlflow.set_tracking_uri(uri)
        self._client = self._mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._run = self._client.create_run(number, run_name=job).info.run_id
        self._held: list[Any] = []
        self._flushed_at = 0.0

    def write(self, step: int, values: dict[str, float]) -> None:
        now = time.time()
        self._held += [self._metric(name, value, round(now * 1000), step) for name, value in values.items()]
        if now - self._flushed_at >= _FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        self._flushed_at = time.time()
        for start in range(0, len(self._held), 1000):  # the most that one request may have
            self._client.log_batch(self._run, metrics=self._held[start : start + 1000])
        self._held = []

    def close(self) -> None:
        self._flush()
        self._client.set_terminated(self._run)


_KINDS: dict[str, Callable[[str, str], Callback]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "otel": OpenTelemetry,
}
_MODULES = {
    "tensorboard": (("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.event_file_writer"), "tensorboard"),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow",), "mlflow"),
    "otel": (("opentelemetry.sdk.trace",), "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"),
}
