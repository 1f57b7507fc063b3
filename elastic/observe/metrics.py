"""Prometheus metrics of a job, by the names in `docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from elastic.errors import SettingsError
from elastic.observe.step_log import Step

_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_WORKER = ("worker", "host", "stage")


class Metrics:
    """The metrics of one job, in a registry of their own."""

    def __init__(self, job: str) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self.registry, "namespace": "elastic"}
        gauge = lambda name, what, labels=(): Gauge(name, what, labels, **common)  # noqa: E731
        counter = lambda name, what, labels=(): Counter(name, what, labels, **common)  # noqa: E731
        self._info = gauge("job_info", "Always 1; the job's name and the layers and workers of its stages.", ("job", "layout"))
        self._job = job
        self._step = gauge("step", "The newest committed step.")
        self._wanted = gauge("steps_wanted", "The number of steps of the loop.")
        self._steps = counter("steps", "Steps committed since this process watches the job.")
        self._skipped = counter("steps_skipped", "Steps that changed nothing, since a loss or gradient was not finite.")
        self._seconds = Histogram("step_seconds", "Seconds of a step.", buckets=_BUCKETS, **common)
        self._loss = gauge("loss", "Mean loss of the newest step.")
        self._rate = gauge("learning_rate", "Learning rate of the first parameter group in the newest step.")
        self._norm = gauge("gradient_norm", "Norm of the gradient of the newest step, before clipping.")
        self._samples = counter("samples", "Samples of committed steps.")
        self._tokens = counter("tokens", "Tokens of committed steps, where the model's input is token ids.")
        self._flops = gauge("model_flops_per_second", "Floating-point operations of the model, a second; 0 if unknown.")
        self._mfu = gauge("mfu", "Model FLOPs utilization of the newest step, from 0 to 1; NaN if the peak or the operations are unknown.")
        self._epoch = gauge("epoch", "The number of the view: it grows with each change of the members.")
        self._workers = gauge("workers", "Workers that train.")
        self._spares = gauge("spares", "Processes that wait to replace a worker.")
        self._stages = gauge("stages", "Pipeline stages.")
        self._hosts = gauge("hosts", "Hosts that take part.")
        self._incidents = counter("incidents", "Recoveries and planned changes of the members.", ("kind",))
        self._stall = counter("stall_seconds", "Seconds that steps were committed later because of incidents.")
        self._recovery = Histogram("recovery_seconds", "Seconds from a fault until all workers train again.", buckets=_BUCKETS, **common)
        self._redone = counter("steps_redone", "Steps that were computed again after a loss.")
        self._moved = counter("bytes_moved", "Bytes of state that incidents have moved between workers.")
        self._saves = counter("saves", "Checkpoints by outcome: saved or failed.", ("outcome",))
        self._memory = gauge("worker_memory_bytes", "Resident memory of a worker.", _WORKER)
        self._pace = gauge("worker_step_seconds", "Median seconds of a worker's last steps.", _WORKER)
        self._links = gauge("link_bytes_per_second", "Observed rate of large messages between two workers.", ("a", "b"))
        self._latency = gauge("link_latency_seconds", "Half a round trip between two workers.", ("a", "b"))
        self._server: Any = None

    @property
    def all(self) -> tuple[Counter | Gauge | Histogram, ...]:
        """The metrics, in the order of their definition."""
        return tuple(each for each in vars(self).values() if isinstance(each, Counter | Gauge | Histogram))

    def serve(self, address: str, port: int) -> int:
        """Answers at `http://address:port/metrics`, and returns the port (a free one for 0). Raises SettingsError."""
        try:
            self._server, _ = start_http_server(port, address, self.registry)
        except OSError as error:
            raise SettingsError(f"metrics_port: {address}:{port} cannot be listened at: {error.strerror or error}") from error
        return self._server.server_port

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def seen(self, message: Mapping[str, Any]) -> None:
        """Handles one message `seen` of `elastic.agent.record`."""
        what = message["what"]
        if what == "steps":
            for row in message["rows"]:
                self._stepped(Step.from_row(row))
        elif what == "incident":
            self._recovered(message["incident"])
        elif what == "view":
            self._changed(message)
        elif what == "live":
            self._stands(message["live"])
        elif what == "event" and message["kind"] == "save":
            self._saves.labels("saved" if message["reason"] is None else "failed").inc()
        elif what == "event" and message["kind"] == "skipped":
            self._skipped.inc()

    def _stepped(self, step: Step) -> None:
        nan = float("nan")
        self._step.set(step.step)
        self._wanted.set(step.of)
        self._steps.inc()
        self._samples.inc(step.samples)
        self._tokens.inc(step.tokens)
        self._loss.set(nan if step.loss is None else step.loss)
        self._norm.set(nan if step.grad_norm is None else step.grad_norm)
        self._rate.set(step.lr)
        self._flops.set(step.flops_per_second)
        self._mfu.set(nan if step.mfu is None else step.mfu)
        if step.seconds is not None:
            self._seconds.observe(step.seconds)

    def _recovered(self, incident: Mapping[str, Any]) -> None:
        self._incidents.labels(incident["kind"]).inc()
        self._stall.inc(max(0.0, incident["stall_ms"] or 0.0) / 1000)
        self._redone.inc(incident["steps_redone"] or 0)
        self._moved.inc(incident["bytes_moved"] or 0)
        if incident["running_ms"] is not None:
            self._recovery.observe(incident["running_ms"] / 1000)

    def _changed(self, members: Mapping[str, Any]) -> None:
        self._epoch.set(members["epoch"])
        self._workers.set(len(members["workers"]))
        self._stages.set(len(members["stages"]))
        self._info.clear()
        self._info.labels(self._job, members["layout"]).set(1)

    def _stands(self, live: Mapping[str, Any]) -> None:
        stages = {worker: str(number) for number, (_, _, members) in enumerate(live["stages"]) for worker in members}
        self._hosts.set(len(live["hosts"]))
        self._spares.set(sum(each["spare"] for each in live["workers"]))
        for metric, name in ((self._memory, "memory"), (self._pace, "step_s")):
            metric.clear()
            for each in live["workers"]:
                if each[name] is not None:
                    metric.labels(each["worker"], each["host"], stages.get(each["worker"], "")).set(each[name])
        for metric, place in ((self._latency, 2), (self._links, 3)):
            metric.clear()
            for link in live["links"]:
                if link[place] is not None:
                    metric.labels(link[0], link[1]).set(link[place])


def described() -> list[tuple[str, str, tuple[str, ...], str]]:
    """Returns name, type, labels and meaning of each metric, in the order of `docs/metrics.md`."""
    found = []
    for collector in Metrics("").all:
        (family,) = collector.describe()
        name = family.name + ("_total" if family.type == "counter" else "")
        found.append((name, family.type, tuple(collector._labelnames), family.documentation))
    return found
