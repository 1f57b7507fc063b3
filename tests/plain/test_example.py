"""Tests the example of a plain loop in real jobs, and what the docs say of it."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(folder: Path, *faults: str) -> dict[str, Any]:
    script = ROOT / "tests" / "plain" / "killed_example.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *faults],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("epoch 9: accuracy 0.9") for line in lines) == 1
    return json.loads(lines[-1])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_two_killed_workers_change_nothing(tmp_path: Path) -> None:
    calm, killed = run(tmp_path / "calm"), run(tmp_path / "killed", "1@20:forward", "0@45:backward")
    assert not calm["kinds"]
    assert killed["missed"] == 0
    assert killed["kinds"].count("death") == 2
    assert killed["digest"] == calm["digest"]


def test_the_docs_show_what_differs_from_the_plain_script() -> None:
    plain, ours = ((ROOT / "examples" / f"{name}.py").read_text().splitlines()[1:] for name in ("plain_torch", "plain"))
    lines = [line for line in difflib.unified_diff(plain, ours, lineterm="", n=0) if not line.startswith(("---", "+++", "@@"))]
    changed = [line for line in lines if line[1:].strip()]
    shown = (ROOT / "docs" / "dropin.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
    assert [line for line in shown if line] == changed
