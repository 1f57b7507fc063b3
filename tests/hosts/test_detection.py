"""Runs the benchmark of lost hosts with one job, which loses one host after the other, and gets each of them back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.long
def test_one_job_loses_one_host_after_the_other(tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "list"], check=False, capture_output=True).returncode:
        pytest.skip("network namespaces are not permitted here")
    figures, kinds = tmp_path / "figures.json", ["drained", "coordinator killed", "agent killed"]
    words = ["--hosts", "--repeats", "1", "--json", str(figures), *(word for kind in kinds for word in ("--kind", kind))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "detection.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = {each["kind"]: each for each in json.loads(figures.read_text())}
    assert [*found] == kinds
    assert found["drained"]["steps_redone"] == 0
    assert all(0 < each["noticed_s"] <= each["running_s"] < 60 for each in found.values())
    assert [each.name for each in tmp_path.iterdir()] == ["figures.json"]
