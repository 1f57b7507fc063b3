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

    Of several jobs of that name it is the one that runs, and if none does, the one that ran last.

    Raises SettingsError if there is none, with the names of those that there are; or if several run.
    """
    if (path := Path(job)).is_dir():
        return RunDirectory(path)
    known = [(name_of(directory), directory) for directory in _temporary()]
    called = [directory for name, directory in known if name == job]
    running = [directory for directory in called if directory.running]
    if len(running) > 1:
        listed = ", ".join(f"{directory.path} ({_progress(directory)})" for directory in running)
        raise SettingsError(f"{len(running)} jobs with the name {job!r} run on this host: give the run directory of one of them: {listed}")
    if called:
        return max(running or called, key=_written_at)
    names = ", ".join(sorted({name for name, _ in known if name}))
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


def _progress(directory: RunDirectory) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        live = json.loads(directory.live.read_text())
        return f"process {live['pid']}, {'no step yet' if live['step'] is None else 'step ' + str(live['step'])}"
    return "it has just ended"


def _written_at(directory: RunDirectory) -> float:
    with suppress(OSError):
        return directory.live.stat().st_mtime
    return 0.0


def _temporary() -> list[RunDirectory]:
    return [RunDirectory(path.parent) for path in sorted(Path(tempfile.gettempdir()).glob("elastic-*/live.json"))]
