"""Tests that the planner's benchmark prints one JSON object for each of its modes, or one line with the error."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from sailor_data import ROOT, SAILOR, needs_data

pytestmark = pytest.mark.slow


def benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "planner.py"), *words], capture_output=True, text=True, env=environment
    )


@needs_data
def test_it_plans_and_exports(tmp_path):
    file = tmp_path / "plan.json"
    done = benchmark("--data", str(SAILOR), "--sailor", "--gpus", "A100-40=4", "--gbs", "64", "--repeat", "1", "--export-sailor", str(file))
    found = json.loads(done.stdout)
    assert set(found) == {"step_s", "search_s", "plan"}
    assert json.loads(file.read_text())["pipeline_list"][0]["num_stages"] == len(found["plan"]["stages"])


@needs_data
def test_it_predicts_measured_runs():
    runs = sorted(str(path) for path in (SAILOR / "runs").glob("*.json"))
    found = json.loads(benchmark("--data", str(SAILOR.parent), "--accuracy", *runs).stdout)
    assert len(found["runs"]) == len(runs)
    assert found["time_error_mean"] < 0.08
    assert found["memory_error_mean"] < 0.10


@needs_data
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--gpus", "A100-40=x"), "'A100-40=x' is not like A100-40=32"),
        (("--gpus", "V100-16=1"), "bytes short"),
        (("--gpus", "A100-40=64", "--model", "OPT-30"), "--gbs is needed"),
        (("--gpus", "A100-40=4", "--model", "BERT"), "has no model BERT"),
    ],
)
def test_it_says_what_is_wrong(words, named):
    done = benchmark("--data", str(SAILOR), "--sailor", *words)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
