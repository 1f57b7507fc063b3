"""Commands in the documents: blocks of shell, lines that are indented, and commands in a text, each checked against what it calls."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

from elastic.checkpoint.cli import app as checkpoints
from elastic.cli.main import app
from elastic.host.private_file import read_private
from tests.docs.blocks import ROOT, blocks, documents

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

KNOWN = ("elastic", "python", "make", "pip", "openssl", "chmod", "kill", "sudo")
_FORM = re.compile(r"(?<=\w)\|[\w|-]+| \.\.\.$|[\[\]]")  # what is left of `--to a|b`, `[--json]` and `...` might be typed
_NUMBER = re.compile(r"(\[WORKER\]|\bWORKER\b|\bN\b)")
_NAMES = re.compile(r" \| \w+")
_COMMENT = re.compile(r"\s+#.*$|\s{3,}.*$")


@dataclass(frozen=True)
class Command:
    """A command, its words, and where it is. A `whole` one can be typed; else arguments may be missing."""

    words: tuple[str, ...]
    where: str
    whole: bool
    line: str

    @property
    def name(self) -> str:
        return Path(self.words[0]).name

    def __str__(self) -> str:
        return f"{self.where} {' '.join(self.words)[:60]}"


def parsed(text: str, where: str, *, whole: bool) -> Iterator[Command]:
    line = _COMMENT.sub("", text)
    for part in line.split(" && "):
        words = shlex.split(_NUMBER.sub("1", _FORM.sub("", _NAMES.sub("", part)) if part.startswith("elastic checkpoint") else part))
        yield Command(tuple(words), where, whole and "..." not in words and "[" not in text, line)


@cache
def commands() -> list[Command]:
    found: list[Command] = []
    for path in documents():
        for block in blocks(path, "sh"):
            for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
                found += parsed(line, block.where, whole=True)
        text = path.read_text()
        without = re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
        for number, line in enumerate(without.splitlines(), 1):
            if re.match(rf"    (\.venv/bin/)?({'|'.join(KNOWN)}) ", line) and not line.startswith("    elastic."):
                found += parsed(line.strip(), f"{path.name}:{number}", whole=True)
            for inline in re.findall(r"`(elastic [^`,]*)`", line):
                found += parsed(inline, f"{path.name}:{number}", whole=False)
    return list({each.words: each for each in found}.values())


def of(*names: str) -> list[Any]:
    return [pytest.param(each, id=str(each)) for each in commands() if each.name in names]


def test_each_line_of_a_block_is_of_a_kind_that_is_checked() -> None:
    assert len(commands()) > 60
    assert {each.name for each in commands()} <= set(KNOWN)


def resolved(words: tuple[str, ...]) -> tuple[Any, list[str]]:
    """Returns the command of these words, below all groups, and its own words."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and not rest[0].startswith("-") and hasattr(command, "get_command"):
        name = rest.pop(0).rstrip(",")
        found = typer.main.get_command(checkpoints) if name == "checkpoint" else command.get_command(None, name)
        assert found is not None, f"there is no command {name}"
        command = found
    return command, rest


@pytest.mark.parametrize("command", of("elastic", "sudo"))
def test_the_parser_of_elastic_takes_it(command: Command) -> None:
    found, words = resolved(command.words[1 if command.name == "elastic" else 2 :])
    if hasattr(found, "get_command"):
        assert all(word.startswith("--") for word in words), "a group is named, or an option of all"
        return
    if not command.whole and words and takes_value(found, words[-1]):
        words.append("1")  # the text names an option
    try:
        found.make_context(found.name, words)
    except Exception as error:  # typer has a copy of click's classes
        if command.whole or type(error).__name__ != "MissingParameter":
            raise


def takes_value(command: Any, word: str) -> bool:
    return any(word in each.opts and not each.is_flag for each in command.params if hasattr(each, "is_flag"))


@pytest.mark.parametrize("command", of("make"))
def test_make_has_the_target(command: Command) -> None:
    assert re.search(rf"^{command.words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", of("pip"))
def test_pip_has_the_extra(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = re.fullmatch(r"(?:\.|elastic-exact)(?:\[([\w,]+)\])?", command.words[-1])
    assert found is not None
    assert set((found[1] or "etcd").split(",")) <= set(extras)


@pytest.mark.parametrize("command", of("openssl"))
def test_the_secret_is_one_that_only_its_owner_can_read(command: Command, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    subprocess.run(["sh", "-c", command.line], cwd=tmp_path, check=True)
    assert len(read_private(tmp_path / "secret", "secret_file")) >= 16


SCRIPTS = of("python")


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_script_is_there(command: Command) -> None:
    assert (ROOT / command.words[1]).is_file() or command.words[1] == "-m"


@cache
def helped(words: tuple[str, ...]) -> str:
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("command", [each for each in SCRIPTS if any(word.startswith("--") for word in each.values[0].words)])
def test_a_script_has_the_options(command: Command) -> None:
    text = helped(tuple(takewhile(lambda word: not word.startswith("--"), command.words[1:])))
    assert [word for word in command.words if word.startswith("--") and word.partition("=")[0] not in text] == []
