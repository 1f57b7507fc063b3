"""Files of JSON lines, which one process appends to while others read them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic.errors import SettingsError


def append_lines(path: Path | str, records: Sequence[Mapping[str, Any]]) -> None:
    """Appends a JSON line for each record in one write: after it, a reader of the file sees all of them. Follows no symbolic link."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        file.write(text.encode())


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """Returns the records of a file of JSON lines, without a last line that is still being written. Raises SettingsError."""
    text = ""
    with suppress(FileNotFoundError):
        text = Path(path).read_bytes().decode()
    records = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SettingsError(f"{path}, line {number}, is not JSON: {error}") from error
    return records
