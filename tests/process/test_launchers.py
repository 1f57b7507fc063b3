"""Programs that call `elastic.run` in other ways than `python script.py`: torchrun, `python -c`, pytest, a notebook."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import elastic
from elastic.errors import SettingsError
from elastic.launch import ranks
from tests.conftest import Leftovers

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "import elastic\n\n"
    "def train(job):\n    return job.settings.workers\n\n"
    "if __name__ == '__main__':\n    print('returned', elastic.run(train, workers=2).value)\n"
)
RANK = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def called(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])} | environment
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=200, check=False
    )


def set_rank(patch: pytest.MonkeyPatch, **changed: str | None) -> None:
    for name, value in {**RANK, **changed}.items():
        patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)


@pytest.mark.parametrize("local", ["2", None])
def test_a_rank_of_several_on_a_host_is_refused(monkeypatch: pytest.MonkeyPatch, local: str | None) -> None:
    set_rank(monkeypatch, LOCAL_WORLD_SIZE=local)
    with pytest.raises(SettingsError, match=rf"rank 1 of 4, {local or 4} of them on this host.*--nproc-per-node=1"):
        elastic.run("train:train", workers=1)
    with pytest.raises(SettingsError, match="--nproc-per-node=1"):
        ranks.check(shared=True)


def test_hosts_that_would_train_by_themselves_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rank(monkeypatch, LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    with pytest.raises(SettingsError, match=r"give elastic\.run etcd=, name= and secret="):
        ranks.check(shared=False)
    ranks.check(shared=True)


@pytest.mark.parametrize("changed", [{"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, {"LOCAL_RANK": None}, {"RANK": "some"}])
def test_a_program_alone_is_not_refused(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None]) -> None:
    set_rank(monkeypatch, **changed)
    ranks.check(shared=False)


@pytest.mark.long
def test_torchrun_with_one_process_a_host_runs_a_job(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--log-dir={tmp_path / 'logs'}"]
    done = called(*torchrun, "--nproc-per-node=1", "train.py", cwd=tmp_path)
    assert "returned 2" in done.stdout, done.stderr
    done = called(*torchrun, "--nproc-per-node=2", "train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "with elastic.run(..., workers=2), or `python` instead of torchrun" in done.stderr


@pytest.mark.long
def test_a_command_line_runs_a_function_of_a_module(tmp_path: Path, leftovers: Leftovers) -> None:
    (tmp_path / "own.py").write_text(PROGRAM)
    done = called("-c", "import elastic, own; print('returned', elastic.run(own.train, workers=2).value)", cwd=tmp_path)
    assert "returned 2" in done.stdout, done.stderr


@pytest.mark.long
@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_a_test_runs_a_job(tmp_path: Path, leftovers: Leftovers, mode: str) -> None:
    (tmp_path / "test_own.py").write_text(
        "import elastic\n\n\ndef train(job):\n    return 7\n\n\ndef test():\n    assert elastic.run(train, workers=1).value == 7\n"
    )
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--import-mode={mode}", "test_own.py"]
    done = called(*words, cwd=tmp_path)
    assert "1 passed" in done.stdout or (mode == "importlib" and "set pythonpath" in done.stdout), done.stdout
    if mode == "importlib":
        assert "1 passed" in called(*words, "-o", "pythonpath=.", cwd=tmp_path).stdout


CELLS = """
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for cell in (
    "import elastic",
    "def train(job): return 7",
    "elastic.run(train, workers=1)",
    "%%writefile train.py\\ndef train(job):\\n    return 7\\n",
    "print('returned', elastic.run('train.py:train', workers=1).value)",
):
    shell.run_cell(cell)
"""


@pytest.mark.long
def test_a_notebook_runs_a_file_that_a_cell_writes(tmp_path: Path, leftovers: Leftovers) -> None:
    pytest.importorskip("IPython")
    (tmp_path / "cells.py").write_text(CELLS)
    done = called("cells.py", cwd=tmp_path, HOME=str(tmp_path))
    assert "begin the cell that defines it with `%%writefile train.py`" in done.stdout + done.stderr
    assert "returned 7" in done.stdout
