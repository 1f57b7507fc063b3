"""Tests the exit codes of `elastic run`, which tell a scheduler whether to start it again; `tests/hosts` has those of joining hosts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic import errors
from elastic.cli.exit_codes import EPILOG, TABLE

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "hosts" / "script.py"


def test_the_documents_and_the_help_have_the_table() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for code, meaning, again in TABLE:
        assert f"| {code} | {meaning} | {again} |" in page
        assert f"{code}: {meaning}. Start again: {again}." in EPILOG


def test_each_error_has_a_code_of_the_table() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ElasticError)]
    assert {str(kind.exit_code) for kind in kinds} == {"1", "2", "3", "75"}
    by_code = {code: sorted(kind.__name__ for kind in kinds if kind.exit_code == code) for code in (3, 75)}
    assert by_code == {3: ["HostUnfit"], 75: ["CoverageLost", "EtcdFull", "EtcdUnavailable", "HostLost", "NameTaken", "NothingSaved"]}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "elastic.cli.main", *map(str, words)]


def ended(*words: object) -> tuple[int, str]:
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False, timeout=200)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [("run",), ("run", f"{SCRIPT}:train", "--workers", "two"), ("agent", f"{SCRIPT}:train"), ("rnu",)])
def test_what_the_command_line_refuses_is_2(words: tuple[str, ...]) -> None:
    assert ended(*words)[0] == 2


@pytest.mark.slow
def test_a_wrong_argument_is_2() -> None:
    code, said = ended("run", f"{SCRIPT}:train", "--isa", "avx1024")
    assert (code, said) == (2, "error: isa='avx1024': use one of avx512, avx2, default\n")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_an_exception_of_train_fn_is_1_and_a_return_0(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("def train(number):\n    return 1 / number\n")
    assert ended("run", f"{script}:train", 1, "--workers", 1)[0] == 0
    code, said = ended("run", f"{script}:train", 0, "--workers", 1)
    assert (code, "ZeroDivisionError" in said) == (1, True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
def test_a_lost_agent_is_75() -> None:
    code, said = ended("run", f"{SCRIPT}:train", 12, json.dumps({"3": [0, "agent"]}), "--workers", 1)
    assert (code, said.splitlines()[-1]) == (
        75,
        "error: the agent, which supervises the workers, died; the system may be out of memory",
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGINT, signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGTERM, signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
    ],
)
def test_a_job_that_is_asked_to_stop_says_by_what(tmp_path: Path, signals: list[signal.Signals], code: int) -> None:
    words = command("run", f"{SCRIPT}:train", 100_000, "{}", 0.3, "--workers", 1, "--directory", tmp_path / "run")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ})
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "members.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.05)  # signals that are pending together arrive as one
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, err
    assert "Traceback" not in err
