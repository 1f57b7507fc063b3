"""Blocks of code in the documents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block: its language, what follows that (such as `job=name`), the text, and where it is."""

    language: str
    words: str
    text: str
    where: str


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str | None = None) -> list[Block]:
    """The blocks of a document, in order."""
    text = path.read_text()
    found = [
        Block(each[1], each[2].strip(), each[3], f"{path.name}:{text.count(chr(10), 0, each.start()) + 1}")
        for each in _BLOCK.finditer(text)
    ]
    return [each for each in found if language in (None, each.language)]
