"""Tests the plug-in of pytest: faults are fluent and checked, a failure has its reasons, and the example's suite passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic.chaos.pytest_plugin import Chaos, Faults
from elastic.errors import SettingsError
from tests.chaos import scripts

ROOT = Path(__file__).parents[2]
PLUGIN = ["-p", "elastic.chaos.pytest_plugin"]


def suite(folder: Path | str, cache: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on a suite, as its author would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "pytest", "-q", *PLUGIN, "-c", "/dev/null", "--rootdir", str(folder), *more, str(folder)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=500)


def test_faults_are_fluent_and_counted():
    faults = Chaos()(scripts.plain, 20, workers=3)
    same = faults.kill(worker=2, at_step=12).stop(worker=1, at=3.5, seconds=2).kill_during_recovery(at_step=14, phase="gate")
    assert same is faults
    assert [str(each) for each in faults.injections] == ["kill@12 place=2", "stop@3.5s place=1 seconds=2", "kill-during-recovery@14:gate"]
    assert faults.job.script == f"{scripts.__file__}:plain"
    assert faults.job.args == (20,)


def test_random_faults_are_added():
    faults = Chaos()(scripts.plain, workers=2, minutes=5.0)
    assert len(faults.random(3, 5.0, kinds=["kill"], count=4).injections) == 4


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda faults: faults.explode(at_step=3), AttributeError, "there is no fault 'explode': use kill, kill_many"),
        (lambda faults: faults.kill(), SettingsError, "give either a time"),
        (lambda faults: faults.kill(at_step=1, seconds=3), SettingsError, "over at once"),
        (lambda faults: faults.partition(at_step=1).run(), SettingsError, "give --hosts 2"),
    ],
)
def test_faults_that_cannot_be_are_refused(act: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        act(Faults(Chaos()(scripts.plain, 3).job))


@pytest.mark.slow
@pytest.mark.long
def test_a_job_that_is_never_run_fails_its_test(tmp_path: Path):
    (tmp_path / "test_it.py").write_text("def test_it(chaos):\n    chaos('elastic.chaos.built_in:train').kill(at_step=3)\n")
    ended = suite(tmp_path, tmp_path)
    assert ended.returncode == 1
    assert "1 job(s) of the chaos fixture were never run" in ended.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("leftovers")
def test_a_script_that_fails_fails_its_test_with_the_reason(tmp_path: Path):
    text = f"def test_it(chaos):\n    chaos('{scripts.__file__}:fails', 20, workers=1).run()\n"
    (tmp_path / "test_it.py").write_text(text)
    ended = suite(tmp_path, tmp_path)
    assert ended.returncode == 1
    assert "chaos: fail" in ended.stdout
    assert "it fails without faults" in ended.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("leftovers")
def test_the_suite_of_the_example_passes(tmp_path: Path):
    ended = suite(ROOT / "examples" / "chaos_suite", tmp_path, "-p", "no:cacheprovider")
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert "3 passed" in ended.stdout
