"""Tests scripts that run as a whole in each worker: `elastic run script.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import elastic
from elastic.errors import NotInJob, SettingsError, TrainFunctionError
from elastic.script.target import MAIN_MODULE, call_arguments, load, name_of
from elastic.worker import job as jobs

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("whole_script.py")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    main = sys.modules["__main__"]
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules["__main__"] = main
    sys.modules.pop(MAIN_MODULE, None)


def written(folder: Path, code: str) -> str:
    script = folder / "script.py"
    script.write_text(code)
    return str(script)


def run(name: str, *arguments: object) -> None:
    script = load(name_of(name))
    script(*call_arguments(script, "the job", arguments))


def test_its_guarded_part_runs_with_its_arguments(tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nif __name__ == '__main__':\n    Path(sys.argv[1]).write_text(' '.join(sys.argv))\n"
    script = written(tmp_path, code)
    run(script, str(tmp_path / "said"), "--lr", "1e-3")
    assert (tmp_path / "said").read_text() == f"{script} {tmp_path}/said --lr 1e-3"


@pytest.mark.parametrize("end", ["sys.exit()", "sys.exit(0)", "raise SystemExit"])
def test_one_that_exits_with_success_has_ended(tmp_path: Path, end: str) -> None:
    run(written(tmp_path, f"import sys\n{end}\n"))


def test_one_that_exits_with_an_error_has_failed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(written(tmp_path, "import sys\nsys.exit('no data')\n"))
    assert ended.value.code == "no data"


@pytest.mark.parametrize(
    "parser",
    [
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--lr', type=float)\np.parse_args()",
        "import typer\ndef main(lr: float = 0.1) -> None: ...\ntyper.run(main)",
    ],
)
def test_one_that_refuses_its_arguments_is_a_wrong_setting(tmp_path: Path, parser: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainFunctionError, match=r"script.py refuses its arguments \(--rate 1\), and has printed why"):
        run(written(tmp_path, parser), "--rate", 1)
    assert "--rate" in capfd.readouterr().err
    run(written(tmp_path, parser), "--help")


def test_what_it_raises_passes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(written(tmp_path, "1 / 0\n"))


def test_one_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainFunctionError, match="there is no file"):
        name_of(str(tmp_path / "missing.py"))


def test_there_is_no_job_outside_of_one() -> None:
    with pytest.raises(NotInJob, match=r"`elastic run script.py` starts"):
        elastic.current_job()


def test_one_that_starts_a_job_itself_is_told_how_to_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_current", SimpleNamespace(settings=SimpleNamespace(train_fn="/a/script.py:__main__")))
    with pytest.raises(SettingsError, match="start it with python"):
        elastic.run(run, workers=1)
    monkeypatch.setattr(jobs, "_current", SimpleNamespace(settings=SimpleNamespace(train_fn="/a/script.py:train")))
    with pytest.raises(SettingsError, match="put the call under"):
        elastic.run(run, workers=1)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_a_killed_worker_changes_nothing_and_one_whose_code_behind_a_body_takes_long_is_not_killed() -> None:
    digests = []
    for options in (["--workers", "1"], ["--workers", "3", "--", "--kill", "3"], ["--workers", "2", "--", "--idle", "5"]):
        command = [sys.executable, "-m", "elastic.cli.main", "run", str(SCRIPT), *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
        assert done.returncode == 0, done.stderr
        digests += [line for line in done.stdout.splitlines() if line.startswith("digest ")]
        assert ("worker 1 (place" in done.stderr) == ("--kill" in options)
        assert ("idle" in done.stdout) == ("--idle" in options)
    assert len(digests) == 3
    assert digests[0] == digests[1] == digests[2] != "digest None"
