"""Runs the benchmark of founders' memory: no founder takes more than its share and one layer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("leftovers")]


def test_founders_take_their_share_and_one_layer(tmp_path: Path):
    file = tmp_path / "peaks.json"
    options = ["--workers", "3", "--layers", "24", "--dim", "512", "--steps", "0", "--eager", "--json", str(file)]
    command = [sys.executable, str(ROOT / "benchmarks" / "large_models.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(file.read_text())
    assert len(found["deferred"]) == 3
    assert all(row["parameter_bytes"] < row["founding"] < row["founding_bound"] for row in found["deferred"])
    assert all(row["founding"] > row["founding_bound"] for row in found["eager"])  # the bound means something
