"""The `elastic` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import elastic
from elastic.cli.main import app
from elastic.host.rundir import RunDirectory
from tests.observe.test_page import live, worker

pytestmark = pytest.mark.usefixtures("leftovers")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "elastic.cli.main", *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:surrogateescape"])
@pytest.mark.parametrize("words", [("top", "--once"), ("events",), ("logs",), ("report", "-o", "\u2026.html")], ids=lambda words: words[0])
def test_characters_that_the_output_cannot_show_are_replaced(tmp_path: Path, words: tuple[str, ...], encoding: str) -> None:
    run = RunDirectory(tmp_path)
    run.write_live({**live(worker(0, host="h" * 200)), "job": "caf\u00e9 \u2026"})
    run.events.write_text(json.dumps({"at": 1.0, "kind": "said", "text": "it costs \u20ac 3 " + "x" * 200}) + "\n")
    run.output.mkdir()
    (run.output / "0.0").write_text("1.0\to\tit costs \u20ac 3\n", encoding="utf-8")
    name, *options = words
    arguments = [sys.executable, "-m", "elastic.cli.main", name, str(run.path), *options]
    encodes = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    done = subprocess.run(arguments, capture_output=True, cwd=tmp_path, env=encodes, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout


@pytest.mark.slow
def test_a_checkpoint_whose_name_the_output_cannot_show(tmp_path: Path) -> None:
    file = tmp_path / "\u20ac.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    arguments = [sys.executable, "-m", "elastic.checkpoint", "verify", str(file)]
    done = subprocess.run(arguments, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?.safetensors: hf: " in done.stdout


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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", [[], pytest.param(["--workers", "3", "--workers-per-device", "2"], marks=pytest.mark.long)])
def test_run_on_a_device_that_is_missing_says_what_to_do(tmp_path: Path, more: list[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text("def train(job):\n    return job.device\n")
    done = command("run", f"{script}:train", "--device", "cuda", *more)
    assert done.returncode == 2
    assert "can use no such device on this host: install its driver" in done.stderr.splitlines()[-1]
    assert "train with device='cpu' or 'auto'" in done.stderr
    assert json.loads(command("run", f"{script}:train", "--device", "auto", *more).stdout) == "cpu"


def test_a_missing_script_is_one_line() -> None:
    done = command("run", "nowhere.py:train")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train_fn='nowhere.py:train': there is no file ")
    assert done.stderr.count("\n") == 1


def commands(command: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that is no group, with the words that name it."""
    if not hasattr(command, "list_commands"):
        yield words, command
        return
    for name in command.list_commands(None):
        yield from commands(command.get_command(None, name), *words, name)


COMMANDS = [(words, found) for words, found in commands(typer.main.get_command(app)) if words != ("checkpoint",)]  # has its own help


@pytest.mark.parametrize(("words", "found"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_help_has_every_word_of_every_option(words: tuple[str, ...], found: Any) -> None:
    """Brackets, as in `[user@]host:port`, are part of what it says."""
    shown = CliRunner().invoke(app, [*words, "--help"], catch_exceptions=False)
    assert shown.exit_code == 0
    text = "".join(shown.output.split())
    missing = [each.name for each in found.params if each.help and "".join(each.help.split()) not in text]
    assert missing == []


def test_the_list_of_commands_says_what_their_help_says() -> None:
    group = typer.main.get_command(app)
    for name, entry in group.table.items():
        assert entry.help == group.get_command(None, name).get_short_help_str(1000), name


def test_a_mistyped_command_names_the_similar_one() -> None:
    shown = CliRunner().invoke(app, ["doctro"])
    assert shown.exit_code == 2
    assert "No such command 'doctro'. Did you mean 'doctor'?" in shown.output
