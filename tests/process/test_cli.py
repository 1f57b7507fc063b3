"""The `elastic` command."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import elastic

pytestmark = pytest.mark.usefixtures("leftovers")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "elastic.cli.main", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_version() -> None:
    assert command("version").stdout.strip() == elastic.__version__


@pytest.mark.slow
def test_run_prints_what_the_leader_returned(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text("def train(job, number, text):\n    return [job.workers, number + 1, text]\n")
    run = tmp_path / "run"
    done = command("run", f"{script}:train", "41", "words", "--workers", "2", "--no-respawn", "--min-workers", "2", "--directory", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [2, 42, "words"]
    assert list(run.iterdir()) == [], "nothing happened that is worth keeping"


def test_a_missing_script_is_one_line() -> None:
    done = command("run", "nowhere.py:train")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train_fn='nowhere.py:train': there is no file ")
    assert done.stderr.count("\n") == 1
