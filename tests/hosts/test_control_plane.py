"""Runs the benchmark of the control plane with few hosts: real agents and a real etcd, and workers that are played without torch."""

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
def test_a_change_costs_few_requests_to_etcd_and_reaches_every_worker(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    words = ["--hosts", "4", "--workers-per-host", "8", "--stages", "4", "--losses", "2", "--check-every", "2", "--json", str(figures)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "control_plane.py"), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert found["real"]["agents"] == 4
    assert len(found["checked_s"]) >= 2, "workers have checked proposals"
    for change in found["changes"]:
        spent, idle = change["etcd"], change["etcd_idle_per_s"]
        assert spent["Txn"] + spent["Put"] + spent["DeleteRange"] < 12
        assert spent["Range"] < 50 + 20 * idle["Range"]
        assert (change["cause"], change["also"], change["attempts"]) == ("death", 7, 1)
    assert [each.name for each in tmp_path.iterdir()] == ["figures.json"]
