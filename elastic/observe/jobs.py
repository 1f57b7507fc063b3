"""Finds the run directory of a job on this host by its name, or takes it by its path."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

from elastic.errors import SettingsError
from elastic.host.rundir import RunDirectory


def find(job: str) -> RunDirectory:
    """Returns the run directory of a job: `job` is its path, or the name of a job whose directory is a temporary one.

    Raises SettingsError if there is none, with the names of those that there are.
    """
    if (path := Path(job)).is_dir():
        return RunDirectory(path)
    known = {name_of(directory): directory for directory in _temporary()}
    if job in known:
        return known[job]
    names = ", ".join(sorted(filter(None, known)))
    there = f"there are: {names}" if names else "no job of yours has one now"
    raise SettingsError(
        f"{job!r} is no run directory, and no job of that name runs on this host with a temporary one ({there}). For a job with "
        "directory=..., also one that has ended, give that directory; for a job of several hosts give --etcd and --secret-file"
    )


def name_of(directory: RunDirectory) -> str:
    """Returns the name of the job that runs, or ran, in a directory; an empty text if it has not begun to train."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(directory.live.read_text())["job"])
    return ""


def _temporary() -> list[RunDirectory]:
    return [RunDirectory(path.parent) for path in sorted(Path(tempfile.gettempdir()).glob("elastic-*/live.json"))]
