"""The configuration reference, from the code: `python -m tests.docs.configuration` writes docs/configuration.md; a test compares it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

import elastic
from elastic.cli.main import app

FILE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# Configuration

Written by `python -m tests.docs.configuration` from signatures, docstrings and the help of commands; a test compares it with them.
"""
VARIABLES = {
    "ELASTIC_RACK": "the rack in which this host stands, where `rack=` or `--rack` does not say it",
    "ELASTIC_SEGMENTS": "0: state is ordinary memory of the workers, which keep copies of each other's state, also within a host",
    "ELASTIC_CLOCKS": "the directory in which jobs record the GPU clocks that they have set on this host",
    "ELASTIC_POWER_SOCKET": "where `elastic power-daemon` listens, by default /run/elastic-power.sock",
    "CUDA_VISIBLE_DEVICES": "the GPUs that workers of this host get",
}
"""Variables of the environment that users set: a test finds each in `elastic/settings.py`, and each of ours there here."""


def written() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, function in (
        ("elastic.run", elastic.run),
        ("elastic.Trainer", elastic.Trainer),
        ("job.prepare", elastic.Job.prepare),
    ):
        parts += [f"## `{title}`\n", table(("argument", "default", "meaning"), arguments(function))]
    parts += ["## Environment\n", table(("variable", "meaning"), [(f"`{name}`", says) for name, says in VARIABLES.items()])]
    group = typer.main.get_command(app)
    for name in group.list_commands(None):
        parts += command(f"elastic {name}", group.get_command(None, name))
    return "\n".join(parts)


def arguments(function: Any) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each parameter; those that the docstring describes together are one row."""
    parameters = inspect.signature(function).parameters
    for names, says in described(inspect.getdoc(function) or ""):
        defaults = [parameters[name].default for name in names]
        shown = {"required" if each is inspect.Parameter.empty else f"`{each!r}`" for each in defaults}
        kinds = {parameters[name].kind for name in names}
        variable = kinds & {inspect.Parameter.VAR_KEYWORD}
        yield ", ".join(f"`{name}`" for name in names), "" if variable else ", ".join(sorted(shown)), says


def described(docstring: str) -> Iterator[tuple[list[str], str]]:
    """The entries under `Args:`: names, and the text on one line."""
    _, _, rest = docstring.partition("Args:\n")
    entries: list[str] = []
    for line in rest.splitlines():
        if not line.strip() or not line.startswith("    "):
            break
        if line.startswith("        ") and entries:
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    for entry in entries:
        names, _, says = entry.partition(": ")
        yield names.split(", "), says


def command(name: str, found: Any) -> list[str]:
    """Sections of a command and of those below it."""
    if hasattr(found, "list_commands"):
        return [part for each in found.list_commands(None) for part in command(f"{name} {each}", found.get_command(None, each))]
    rows = [option(each) for each in found.params if each.name != "help"]
    title = [f"## `{name}`\n", " ".join((found.help or "").split()) + "\n"]
    return [*title, table(("option", "default", "meaning"), rows)] if rows else title


def option(each: Any) -> tuple[str, str, str]:
    names = " ".join(f"`{name}`" for name in [*each.opts, *each.secondary_opts])
    argument = each.param_type_name == "argument"
    required = "required" if each.required else ""
    default = "" if each.default in (None, (), []) or isinstance(each.default, Callable) else f"`{each.default}`"
    return (f"`{each.name.upper()}`" if argument else names), default or required, each.help or ""


def table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines) + "\n"


def own_variables() -> set[str]:
    """Variables of this package's own that the settings read."""
    source = Path(inspect.getfile(elastic)).with_name("settings.py").read_text()
    return set(re.findall(r'"(ELASTIC_[A-Z_]+)"', source))


if __name__ == "__main__":
    FILE.write_text(written())
