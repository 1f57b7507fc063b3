"""Tests that deliberate defects in a copy of the runtime are found by the harness, and named by the right oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = (
    "a replica skipped",
    "a stale epoch accepted",
    "a micro-batch dropped",
    "a randomness key used twice",
    "an update applied twice",
    "a header marked before its contents",
)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("name", NAMES)
def test_a_defect_is_found_and_named(name: str, tmp_path: Path):
    path = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos_defects.py"), "--no-sound", "--defect", name, "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=800)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = json.loads(path.read_text())
    assert (row["defect"], row["found"]) == (name, True)
