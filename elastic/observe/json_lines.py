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
    """Appends a JSON line for each record in one write: after it, a reader of the file sees all of them. Follows no symbolic link.

    Raises OSError if they cannot be written, as on a full disk: then none of them is in the file.
    """
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        end = os.fstat(file).st_size
        try:
            while data:  # a write to a disk that becomes full writes a part, and only the next one fails
                data = data[os.write(file, data) :]
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)


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
