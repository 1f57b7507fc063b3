"""Tests `elastic doctor` on this machine alone; `tests/hosts/test_doctor_hosts.py` has a job of other hosts."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic.launch.examine import ERROR, OK, WARNING, computed, machine
from elastic.settings import best_isa

pytestmark = [pytest.mark.slow, pytest.mark.long]


def doctor(*words: str, before: Callable[[], object] | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
    """Returns the exit code and the findings by what they are about."""
    command = [sys.executable, "-m", "elastic.cli.main", "doctor", "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, preexec_fn=before)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["ok"] == (done.returncode == 0)
    return done.returncode, {each["what"]: each for each in found["findings"]}


def test_this_machine_is_fit_and_each_finding_is_one_line() -> None:
    code, found = doctor()
    assert code == 0
    assert {each["level"] for each in found.values()} <= {OK, WARNING}
    assert found.keys() >= {
        "Python",
        "torch",
        "etcd binary",
        "limits",
        "memory",
        "processors",
        "huge pages",
        "shared memory",
        "locked memory",
    }
    assert not any("\n" in each["found"] + each["advice"] for each in found.values())


def test_the_table_names_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "elastic.cli.main", "doctor", "--workers", "5000", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if "open files" in line)
    assert "error" in line
    assert "raise `ulimit -n`" in line
    assert any("warning" in line and "processors" in line and "start fewer workers" in line for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("kind", "value", "what", "level", "advice"),
    [
        (resource.RLIMIT_NOFILE, 40, "limits", ERROR, "raise `ulimit -n`"),
        (resource.RLIMIT_NOFILE, 100, "private etcd", ERROR, "raise `ulimit -n`, or name a running etcd with etcd='host:port'"),
        (resource.RLIMIT_FSIZE, 70_000_000, "memory that outlives workers", WARNING, "raise `ulimit -f`"),
    ],
)
def test_a_limit_that_is_too_small(kind: int, value: int, what: str, level: str, advice: str) -> None:
    code, found = doctor(before=lambda: resource.setrlimit(kind, (value, value)))
    assert (found[what]["level"], found[what]["advice"]) == (level, advice)
    assert code == (1 if level == ERROR else 0)


def test_an_etcd_that_is_not_there() -> None:
    code, other = doctor("--etcd", "127.0.0.1:1")
    assert code == 1
    assert other["etcd"]["level"] == ERROR
    assert "127.0.0.1:1 cannot be reached" in other["etcd"]["found"]
    assert "check that it runs" in other["etcd"]["advice"]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    found = {each.what: each for each in machine(Path("/proc"), 2, 1, own_etcd=False)}
    assert found["run directory"].level == ERROR
    assert "TMPDIR" in found["run directory"].advice


def test_torch_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so is broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding, result = computed(1, best_isa())
    assert (finding.level, finding.found, result) == (ERROR, "ImportError: libtorch.so is broken", {})


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--job", "job"), "a job is found at its etcd"),
        (("--etcd", "https://there"), "etcd=...: use 'host:port'"),
        (("--etcd", "127.0.0.1:1", "--secret-file", "/nowhere"), "secret_file='/nowhere' cannot be read"),
    ],
)
def test_arguments_that_are_wrong(words: tuple[str, ...], why: str) -> None:
    code, found = doctor(*words)
    assert code == 1
    assert any(why in each["found"] and each["level"] == ERROR for each in found.values())
