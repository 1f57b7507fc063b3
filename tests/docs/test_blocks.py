"""Code in the documents: all of it parses, what can run is run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Leftovers
from tests.docs.blocks import ROOT, Block, blocks, documents

PYTHON = [block for path in documents() for block in blocks(path, "python")]
COMING_FROM = blocks(ROOT / "docs" / "coming-from.md", "python")
JOBS = [block for block in COMING_FROM if block.words.startswith("job=")]


@pytest.mark.parametrize("block", PYTHON, ids=[block.where for block in PYTHON])
def test_python_is_python(block: Block) -> None:
    compile(block.text, block.where, "exec")


@pytest.mark.long
@pytest.mark.parametrize("block", JOBS, ids=[block.words for block in JOBS])
def test_a_block_that_names_a_job_trains_alike_on_one_worker_and_on_two(block: Block, tmp_path: Path, leftovers: Leftovers) -> None:
    for package in re.findall(r"^ *(?:import|from) (lightning|transformers|accelerate|peft)\b", block.text, re.MULTILINE):
        if importlib.util.find_spec(package) is None:  # not imported here, which would make torch's cache directory
            pytest.skip(f"could not import {package!r}")
    shared = next(each.text for each in COMING_FROM if not each.words)
    (tmp_path / "script.py").write_text(shared + "\n\n" + block.text)
    name = block.words.removeprefix("job=")
    digests = []
    for workers in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "elastic.cli.main", "run", f"script.py:{name}", "--workers", workers],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.splitlines()[-1])
    assert digests[0] == digests[1] != "null"


DEFINED = """
import elastic, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x))


torch.manual_seed(1)
dataset = TensorDataset(torch.randn(128, 8), torch.randint(0, 8, (128,)))
"""
MODEL = """torch.manual_seed(1)
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(dataset, batch_size=32, shuffle=True)"""


@pytest.mark.long
@pytest.mark.parametrize(("number", "said"), [(0, r"\n0 \d.*\n[0-9a-f]{64}\n"), (1, r"0 \d[^\n]*\n.*1 \d")], ids=["Trainer", "plain loop"])
def test_a_block_of_the_readme_runs_with_what_it_leaves_out(number: int, said: str, tmp_path: Path, leftovers: Leftovers) -> None:
    text = blocks(ROOT / "README.md", "python")[number].text
    shorter = text.replace("steps=1000", "steps=3").replace("...  # model, optimizer and DataLoader as before", MODEL)
    (tmp_path / "script.py").write_text(DEFINED + shorter)
    started = ["script.py"] if "__main__" in text else ["-m", "elastic.cli.main", "run", "script.py:train", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *started], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(said, "\n" + done.stdout, re.DOTALL), done.stdout


def test_files_that_the_page_of_failures_names_exist() -> None:
    named = re.findall(r"`(tests/[^`]+)`", (ROOT / "docs" / "failures.md").read_text())
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).is_file()] == []
