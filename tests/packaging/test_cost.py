"""What it costs to import the package, to ask for help, and to complete a command."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELP = [sys.executable, "-m", "elastic.cli.main", "--help"]
LOADED = "import sys, {module}; print(*sys.modules)"
HEAVY = {"torch", "numpy", "scipy", "grpc", "etcd3", "cryptography", "google"}
HELP_S = 0.3
IMPORT_S = 0.2


def output(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=os.environ | environment)
    return done.stdout


def seconds(command: list[str]) -> float:
    """Processor seconds of a command, the least of some runs: other processes of the machine do not count."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        output(command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["elastic", "elastic.cli.main"])
def test_an_import_loads_nothing_heavy(module: str) -> None:
    loaded = set(output([sys.executable, "-c", LOADED.format(module=module)]).split())
    assert module in loaded
    assert not {name.partition(".")[0] for name in loaded} & HEAVY


@pytest.mark.long
def test_help_is_there_at_once() -> None:
    assert "Commands:" in output(HELP)
    assert seconds(HELP) < HELP_S


@pytest.mark.long
def test_the_package_costs_little_more_than_torch() -> None:
    timed = "import time, torch; begun = time.thread_time(); import elastic; print(time.thread_time() - begun)"
    assert min(float(output([sys.executable, "-c", timed])) for _ in range(3)) < IMPORT_S


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("elastic st", {"status", "stop"}),
        pytest.param("elastic run --spa", {"--spares"}, marks=pytest.mark.long),
        pytest.param("elastic chaos shr", {"shrink"}, marks=pytest.mark.long),
    ],
)
def test_a_shell_completes_commands_and_options(typed: str, found: set[str]) -> None:
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'elastic'; from elastic.cli.main import main; main()"]
    asked = {"_ELASTIC_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert set(output(command, **asked).split()) == found


@pytest.mark.long
def test_completion_is_installed_in_a_shell(tmp_path: Path) -> None:
    """bash is recognised as the parent of the command; hence the second command, without which it would become the first."""
    command = [shutil.which("bash") or "bash", "-c", f"{Path(sys.executable).parent}/elastic --install-completion; true"]
    assert "bash completion installed" in output(command, HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    shown = output(["bash", "--rcfile", str(tmp_path / ".bashrc"), "-ic", "complete -p elastic"], HOME=str(tmp_path))
    assert shown.split()[-1] == "elastic"
