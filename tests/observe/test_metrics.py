"""Metrics for Prometheus: what they say, and that docs and dashboard name exactly them."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from elastic.errors import SettingsError
from elastic.observe.incident import Incident
from elastic.observe.metrics import Metrics, described
from tests.observe.test_journal import step

ROOT = Path(__file__).parents[2]
VIEW = {"what": "view", "epoch": 2, "layout": "[0-1]x2", "workers": [0, 2], "stages": [{}]}
LIVE = {
    "stages": [[0, 2, [0, 2]]],
    "hosts": [{}],
    "workers": [
        {"worker": 0, "host": "a", "spare": False, "memory": 1000, "step_s": 0.5},
        {"worker": 2, "host": "a", "spare": False, "memory": None, "step_s": None},
    ],
    "links": [[0, 2, 0.001, None]],
}


def value(metrics: Metrics, sample: str) -> float:
    return dict(line.rsplit(" ", 1) for line in generate_latest(metrics.registry).decode().splitlines() if line[0] != "#")[sample]


def test_what_happens_is_counted():
    metrics = Metrics("mine")
    metrics.seen(
        {"what": "steps", "rows": [step(0, tokens=100, seconds=None).to_row(), step(1, loss=None, flops=10, peak_flops=80.0).to_row()]}
    )
    incident = Incident(kind="death", stall_ms=1500.0, running_ms=40.0, steps_redone=1, bytes_moved=77).to_json()
    metrics.seen({"what": "incident", "incident": incident})
    metrics.seen(VIEW)
    metrics.seen({"what": "live", "live": LIVE})
    metrics.seen({"what": "event", "kind": "save", "reason": None})
    found = {
        "elastic_steps_total": 2,
        "elastic_step": 1,
        "elastic_tokens_total": 100,
        "elastic_step_seconds_count": 1,
        "elastic_model_flops_per_second": 20,
        "elastic_mfu": 0.25,
        "elastic_stall_seconds_total": 1.5,
        'elastic_incidents_total{kind="death"}': 1,
        'elastic_job_info{job="mine",layout="[0-1]x2"}': 1,
        'elastic_worker_memory_bytes{host="a",stage="0",worker="0"}': 1000,
        'elastic_link_latency_seconds{a="0",b="2"}': 0.001,
        'elastic_saves_total{outcome="saved"}': 1,
    }
    assert {name: float(value(metrics, name)) for name in found} == found
    metrics.seen({"what": "live", "live": {**LIVE, "workers": []}})
    with pytest.raises(KeyError):
        value(metrics, 'elastic_worker_memory_bytes{host="a",stage="0",worker="0"}')


def test_they_are_answered_on_loopback_and_a_used_port_is_an_error():
    metrics, other = Metrics("mine"), Metrics("other")
    port = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"elastic_steps_total 0.0" in answer.read()
        with pytest.raises(SettingsError, match=rf"127\.0\.0\.1:{port} cannot be listened at: Address already in use"):
            other.serve("127.0.0.1", port)
    finally:
        metrics.close()


def test_the_documentation_has_exactly_these_metrics():
    table = [line for line in (ROOT / "docs/metrics.md").read_text().splitlines() if line.startswith("| `")]
    form = "| `{}` | {} | {} | {} |"
    assert table == [
        form.format(name, kind, ", ".join(f"`{each}`" for each in labels) or "-", text) for name, kind, labels, text in described()
    ]


def test_every_query_of_the_dashboard_names_an_existing_metric():
    dashboard = json.loads((ROOT / "examples/deploy/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    known = {name + end for name, kind, _, _ in described() for end in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))}
    named = {name for query in queries for name in re.findall(r"elastic_\w+", query)}
    assert named <= known
    assert {name.removesuffix("_bucket") for name in named} == {name for name, *_ in described()}, "each metric is on the dashboard"
    for query in queries:
        labels = set(re.findall(r"by \((\w+)\)", query)) - {"le"}
        assert not labels, query
