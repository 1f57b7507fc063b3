"""Tests the examples of plain loops in real jobs, and what the docs say of them."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_LANGUAGE = "epoch 3: loss ", ("transformers", "datasets")
EXAMPLES = [
    ("plain", "epoch 9: accuracy 0.9", ()),
    ("gan", "epoch 9: distance ", ()),
    ("finetune", *_LANGUAGE),
    ("lora", _LANGUAGE[0], (*_LANGUAGE[1], "peft")),
    ("hf_trainer", "loss 1.", (*_LANGUAGE[1], "accelerate")),
    ("digits", "epoch 3: accuracy 0.9", ("sklearn",)),
    ("streaming", "step 79: loss ", ("datasets",)),
    ("accelerated", "epoch 9: accuracy 0.9", ("accelerate",)),
    ("lightning_module", "accuracy 0.9", ("lightning",)),
]
"""Names of examples, how the last line of each begins, and packages that it needs."""


def run(name: str, last: str, folder: Path, *faults: str) -> dict[str, Any]:
    script = ROOT / "tests" / "plain" / "killed_example.py"
    done = subprocess.run(
        [sys.executable, str(script), name, str(folder), *faults],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor")},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith(last) for line in lines) == 1
    return json.loads(lines[-1])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(500)
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize(("name", "last", "needs"), EXAMPLES)
def test_two_killed_workers_change_nothing(
    name: str, last: str, needs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing := [package for package in needs if importlib.util.find_spec(package) is None]:
        pytest.skip(f"needs {missing[0]}")
    monkeypatch.chdir(tmp_path)
    calm, killed = run(name, last, tmp_path / "calm"), run(name, last, tmp_path / "killed", "1@20:forward", "0@45:backward")
    assert not calm["kinds"]
    assert killed["missed"] == 0
    assert killed["kinds"].count("death") == 2
    assert killed["digest"] == calm["digest"]


@pytest.mark.parametrize(
    ("document", "place", "name"),
    [
        ("dropin", 1, "plain"),
        ("dropin", 2, "gan"),
        ("dropin", 3, "finetune"),
        ("dropin", 4, "lora"),
        ("dropin", 5, "digits"),
        ("dropin", 6, "streaming"),
        ("frameworks", 1, "hf_trainer"),
        ("frameworks", 2, "accelerated"),
        ("frameworks", 3, "lightning_module"),
    ],
)
def test_the_docs_show_what_differs_from_the_plain_script(document: str, place: int, name: str) -> None:
    plain, ours = ((ROOT / "examples" / f"{each}.py").read_text().splitlines()[1:] for each in (f"{name}_torch", name))
    lines = [line for line in difflib.unified_diff(plain, ours, lineterm="", n=0) if not line.startswith(("---", "+++", "@@"))]
    changed = [line for line in lines if line[1:].strip()]
    shown = (ROOT / "docs" / f"{document}.md").read_text().split("```diff\n")[place].split("```")[0].splitlines()
    assert [line for line in shown if line] == changed
