"""`elastic.run(log="otel:SERVICE")`: incidents as spans of OpenTelemetry, with a span for each phase of the recovery."""

from __future__ import annotations

import importlib
import time
from typing import Any

from elastic.launch.callbacks import Callback
from elastic.observe import incident as incidents
from elastic.observe.activity import RECOVERY_PHASES
from elastic.observe.incident import Incident

_FIGURES = ("worker", "place", "step", "phase", "epoch", "attempts", "stall_ms", "steps_redone", "bytes_moved", "cause", "why")


class OpenTelemetry(Callback):
    """Sends spans to the program's own tracer provider, if it has set one; else by OTLP over HTTP, to where the standard variables
    OTEL_EXPORTER_OTLP_... say."""

    def __init__(self, where: str, job: str) -> None:
        api = importlib.import_module("opentelemetry.trace")
        self._trace, self._job = api, job
        self._own: Any = None
        provider = api.get_tracer_provider()
        if type(provider).__name__ == "ProxyTracerProvider":  # nobody has set one
            sdk = importlib.import_module("opentelemetry.sdk.trace")
            batches = importlib.import_module("opentelemetry.sdk.trace.export").BatchSpanProcessor
            resource = importlib.import_module("opentelemetry.sdk.resources").Resource.create({"service.name": where})
            exporter = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
            provider = self._own = sdk.TracerProvider(resource=resource)
            provider.add_span_processor(batches(exporter))
        self._tracer = provider.get_tracer("elastic")

    def on_incident(self, incident: Incident) -> None:
        if incident.at is None:
            return
        begin = round((time.time() - time.monotonic() + incident.at) * 1e9)
        detected = begin + round((incident.detected_ms or 0.0) * 1e6)
        parts = [(phase, round(incident.phases_ms[phase] * 1e6)) for phase in RECOVERY_PHASES if phase in incident.phases_ms]
        end = max(detected + sum(took for _, took in parts), begin + round((incident.running_ms or 0.0) * 1e6))
        found = incident.to_json()
        figures = {f"elastic.{name}": found[name] for name in _FIGURES if found[name] is not None}
        text = {"elastic.job": self._job, "elastic.text": incidents.timeline(incident)}
        span = self._tracer.start_span(f"incident: {incident.kind}", start_time=begin, attributes={**text, **figures})
        inside, at = self._trace.set_span_in_context(span), detected
        for phase, took in parts:
            self._tracer.start_span(phase, context=inside, start_time=at).end(at + took)
            at += took
        span.end(end)

    def close(self) -> None:
        """Sends what was not sent yet."""
        if self._own is not None:
            self._own.shutdown()
