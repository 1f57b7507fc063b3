"""Appends to the files in which a run is recorded: they are for people to read, so a full disk is no reason to disturb a running job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elastic.observe import console
from elastic.observe.json_lines import append_lines


class Records:
    """Appends to all records of this process. What cannot be written is lost; the job prints so the first time."""

    def __init__(self) -> None:
        self._told = False

    def append(self, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends a JSON line for each of `lines`: all of them, or none."""
        try:
            append_lines(path, lines)
        except OSError as error:  # the disk is full, or the directory is gone
            told, self._told = self._told, True
            if not told:
                what = f"records of this run cannot be written any more, and will lack what happens now: {error}"
                console.say(f"{what}. The training goes on")


own = Records()
"""This process's."""
