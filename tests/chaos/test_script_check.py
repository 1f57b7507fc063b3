"""Tests that a script that workers could not import is refused before a job starts, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from elastic.chaos import trial
from elastic.chaos.schedule import JobSpec
from elastic.chaos.script_check import check
from elastic.cli.main import app
from elastic.errors import TrainFunctionError

GOOD = "def train(job, steps=3):\n    pass\n"
FILES = {
    "good.py": GOOD,
    "notes.md": "# Notes\n\nSome words.\n",
    "broken.py": "def train(job:\n    pass\n",
    "needs.py": f"import no_such_package\n{GOOD}",
    "raises.py": f"def prepare():\n    raise ValueError('no data here')\nprepare()\n{GOOD}",
    "leaves.py": "import sys\nprint('usage')\nsys.exit(3)\n",
    "dies.py": "import os, sys\nprint('out of luck', file=sys.stderr, flush=True)\nos._exit(9)\n",
    "starts.py": f"import elastic\n{GOOD}elastic.run(train, workers=1)\n",
    "later.py": "async def train(job):\n    pass\n",
    "talks.py": f"print('hello')\nprint('no newline', end='')\n{GOOD}",
    "sibling.py": f"import good\nimport torch\n{GOOD}",
}
BAD = [
    ("notes.md:train", "notes.md is a file, but no script of Python: its name does not end in .py"),
    ("good.py:trian", "good.py has no function trian"),
    ("none.py:train", "there is no file"),
    ("no_such_package.train:train", "train_fn's module no_such_package.train cannot be imported: No module named 'no_such_package'"),
    ("broken.py:train", "broken.py cannot be imported, so no job was started: SyntaxError: "),
    ("broken.py", "broken.py cannot be imported, so no job was started: SyntaxError: "),
    ("needs.py:train", "needs.py cannot be imported, so no job was started: ModuleNotFoundError: No module named 'no_such_package'"),
    ("raises.py:train", "raises.py cannot be imported, so no job was started: ValueError: no data here"),
    ("leaves.py:train", "it calls sys.exit(3) while it is imported"),
    ("dies.py:train", "the process that imports it ends with exit code 9. out of luck"),
    ("starts.py:train", "the script starts a job while it is imported"),
    ("later.py:train", "train_fn train is an async function"),
    ("./notes.md:train", "notes.md cannot be imported, so no job was started: "),
]


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)

    def run(*_: object) -> None:
        raise AssertionError("a job was started")

    monkeypatch.setattr(trial, "_evidence", run)
    return tmp_path


def refused(script: str, *words: str) -> str:
    result = CliRunner().invoke(app, ["chaos", "run", "--fault", "kill@3", "--script", script, *words])
    assert result.exit_code == 2, result.output
    return result.output


@pytest.mark.parametrize(("script", "message"), [BAD[0], pytest.param(*BAD[7], marks=pytest.mark.slow)])
def test_a_script_that_cannot_be_imported_is_refused_before_a_job_starts(scripts: Path, script: str, message: str):
    assert message in refused(script)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("script", "message"), BAD)
def test_each_reason_is_said(scripts: Path, script: str, message: str):
    assert message in refused(script)


@pytest.mark.slow
@pytest.mark.long
def test_the_users_own_frames_are_shown(scripts: Path):
    said = refused("raises.py:train")
    assert "in prepare" in said
    assert "elastic/script" not in said


@pytest.mark.slow
@pytest.mark.long
def test_arguments_that_do_not_fit_are_refused(scripts: Path):
    assert "takes neither (job, *args) nor (*args): args has 3 values" in refused("good.py:train", *["--arg", "1"] * 3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("script", ["good.py:train", "good:train", "talks.py:train", "talks.py", "sibling.py:train"])
def test_a_script_that_can_be_imported_is_not_refused(scripts: Path, script: str):
    check(JobSpec(script=script))


@pytest.mark.slow
@pytest.mark.long
def test_a_scenario_and_a_report_are_refused_for_the_same_reasons(scripts: Path):
    (scripts / "s.toml").write_text('[job]\nscript = "notes.md:train"\nsteps = 20\n')
    result = CliRunner().invoke(app, ["chaos", "run", "s.toml"])
    assert (result.exit_code, "no script of Python" in result.output) == (2, True), result.output
    with pytest.raises(TrainFunctionError, match="has no function trian"):
        check(JobSpec(script="good.py:trian"))
