"""Tests users' scripts in all places and conditions in which Python itself can run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("leftovers")]

MANY = """#!/usr/bin/env python
import multiprocessing, os, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader
import checkpoint, grpc, helper, snapshot
import elastic

class Squares:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return index * index

def double(value):
    return 2 * value

def train(job, text):
    found = {"modules": [os.path.dirname(module.__file__) for module in (checkpoint, grpc, helper, snapshot)], "text": len(text)}
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found[method] = pool.map(double, [1, 2])
    loader = DataLoader(Squares(), num_workers=1, multiprocessing_context="spawn")
    found["loader"] = [int(value) for value in loader]
    found["name"] = Squares.__module__
    return found

if __name__ == "__main__":
    sys.path.append(Path(__file__).parent / "not text")
    print(__import__("json").dumps(elastic.run(train, workers=1, args=["x" * (2 << 20)]).value))
"""


def python(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False, **options)  # type: ignore[call-overload]


@pytest.mark.long
def test_a_script_without_a_suffix_with_own_modules_that_are_called_as_ours_and_children_of_every_kind(tmp_path: Path) -> None:
    """Its name is `train`, SIGCHLD is ignored, 2 MB are passed, and `sys.path` has what is no text."""
    script = tmp_path / "train"
    script.write_text(MANY)
    for name in ("checkpoint", "snapshot", "grpc", "etcd3", "six", "helper"):
        (tmp_path / f"{name}.py").write_text("own = True\n")
    done = python(script, preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["modules"] == [str(tmp_path)] * 4
    assert found["text"] == 2 << 20
    assert found["fork"] == found["spawn"] == found["forkserver"] == [2, 4]
    assert found["loader"] == [0, 1, 4, 9]


def test_a_script_in_another_directory_finds_what_lies_beside_it_and_a_working_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "train.py").write_text("import beside_it\ndef train(job):\n    return beside_it.VALUE\n")
    (tmp_path / "there" / "beside_it.py").write_text("VALUE = 7\n")
    command = ("-m", "elastic.cli.main", "run", tmp_path / "there" / "train.py:train", "--workers", "1")
    done = python(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    gone = tmp_path / "gone"
    gone.mkdir()
    done = python(*command, cwd=gone, preexec_fn=gone.rmdir)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the working directory of this program was removed")
    assert done.stderr.count("\n") == 1


EDITED = """
import os, signal, sys, time
import torch
from torch import nn
import elastic, scale

def loss(output, batch):
    return output.pow(2).mean() * scale.SCALE

def train(job):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = elastic.Trainer(model, loss, optimizer, lambda step, part: torch.ones(4, 8), batch_size=16, micro_batch_size=4)
    for report in trainer.run(1000):
        if report.step == 3 and job.worker == 1:
            open(__file__, "a").write("raise RuntimeError('the next experiment')\\n")
            os.remove(scale.__file__)
            os.kill(os.getpid(), signal.SIGKILL)
        if job.worker > 1:
            job.stop_requested = True
        time.sleep(0.02)
    return report.epoch, report.workers

if __name__ == "__main__":
    print(elastic.run(train, workers=2, stages=1).value)
"""


@pytest.mark.long
def test_a_replacement_runs_the_code_that_the_job_began_with(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(EDITED)
    (tmp_path / "scale.py").write_text("SCALE = 1.0\n")
    done = python(tmp_path / "train.py", cwd=tmp_path)
    assert done.stdout == "[3, 2]\n", done.stderr
    assert "the next experiment" in (tmp_path / "train.py").read_text()
