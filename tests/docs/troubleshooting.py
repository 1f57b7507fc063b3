"""The table of errors in docs/troubleshooting.md, from `elastic.errors`: `python -m tests.docs.troubleshooting` writes it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from elastic import errors
from tests.docs.configuration import table

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "troubleshooting.md"


def kinds() -> str:
    """The table."""
    rows = []
    for name, value in vars(errors).items():
        if inspect.isclass(value) and value.__module__ == errors.__name__:
            code = str(value.exit_code) if issubclass(value, errors.ElasticError) else "143, 129"
            says = (inspect.getdoc(value) or "").split("\n\n")[0]
            rows.append((f"`{name}`", f"`{value.__bases__[0].__name__}`", code, " ".join(says.split())))
    return table(("error", "is a", "exit code", "meaning"), rows)


def named() -> list[str]:
    """The messages that the page explains: the first column of its tables, before the table of errors."""
    head = FILE.read_text().partition("## Kinds of errors")[0]
    return re.findall(r"^\| `([^`]+)` \|", head, re.MULTILINE)


def messages() -> Iterator[list[str]]:
    """The fixed parts of every text in the code."""
    paths = [path for folder in ("elastic", "checkpoint", "snapshot") for path in sorted((ROOT / folder).rglob("*.py"))]
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.JoinedStr):
            yield [part.value for part in node.values if isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [node.value]


def is_of(message: str, parts: list[str]) -> bool:
    """Whether the parts have those of the message in this order."""
    at = 0
    text = "\0".join(parts)
    for piece in filter(None, message.split("...")):
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


if __name__ == "__main__":
    head, _, _ = re.split(r"(ERRORS|^\| error \|)", FILE.read_text(), maxsplit=1, flags=re.MULTILINE)
    FILE.write_text(head + kinds())
