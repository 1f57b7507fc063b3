"""Reads a file with a secret, which other users of the host must not be able to read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from elastic.errors import SettingsError


def read_private(path: Path, argument: str) -> bytes:
    """Returns the file's content without white space around it. `argument` names the path in messages.

    Raises SettingsError if the file cannot be read, or if other users can read it too.
    """
    try:
        with path.open("rb") as file:
            mode, value = os.fstat(file.fileno()).st_mode, file.read().strip()
    except OSError as error:
        raise SettingsError(f"{argument}={str(path)!r} cannot be read: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"{argument}={str(path)!r} can be read by other users of this host: chmod 600 it")
    return value
