"""Finds the run directory of a job on this host by its name, or takes it by its path."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastic.errors import SettingsError
from elastic.host.rundir import RunDirectory
from elastic.observe.journal import LinesReader

_FIRST = 4096  # bytes of a journal that hold its first line


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A run directory with the name of its job, whether that runs, and the time of day when it began."""

    directory: RunDirectory
    name: str
    running: bool
    began: float

    @property
    def shown(self) -> str:
        """The directory, and when its job began."""
        return f"{self.directory.path} (began {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.began))})"


def find(job: str, note: Callable[[str], None] = lambda _: None) -> RunDirectory:
    """Returns the run directory of a job: `job` is its path, or the name of a job whose directory is a temporary one.

    Of several jobs of that name it is the one that runs, or the newest if none runs; then `note` is called with a sentence that says so.
    Raises SettingsError if several of them run, with their directories, or if there is none, with the names of those that there are.
    """
    if (path := Path(job)).is_dir():
        return RunDirectory(path)
    chosen, sentence = choose(job, [_found(directory) for directory in _temporary()])
    if sentence:
        note(sentence)
    return chosen.directory


def choose(job: str, known: Sequence[Found]) -> tuple[Found, str]:
    """Returns the job of this name, and a sentence about the choice, empty if it needs none. Raises SettingsError, as `find` does."""
    named = sorted((each for each in known if each.name == job), key=lambda each: -each.began)
    running = [each for each in named if each.running]
    if len(running) > 1:
        listed = "\n".join(f"  {each.shown}" for each in running)
        raise SettingsError(f"{len(running)} jobs of the name {job!r} run on this host: give the run directory of one instead\n{listed}")
    if running or len(named) == 1:
        return (running or named)[0], ""
    if named:
        newest = named[0]
        rest = "for another one give its run directory"
        return newest, f"{len(named)} jobs of the name {job!r} have ended: this is the newest, {newest.shown}; {rest}"
    names = ", ".join(sorted({each.name for each in known} - {""}))
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


def began(directory: RunDirectory) -> float:
    """Returns the time of day when the job began that runs, or ran, in a directory; the time of its last state if it has no journal yet."""
    for event in LinesReader(directory.events, most=_FIRST).read()[:1]:
        with suppress(KeyError, TypeError, ValueError):
            return float(event["at"])
    with suppress(OSError):
        return directory.live.stat().st_mtime
    return 0.0


def _found(directory: RunDirectory) -> Found:
    return Found(directory=directory, name=name_of(directory), running=directory.running, began=began(directory))


def _temporary() -> list[RunDirectory]:
    return [RunDirectory(path.parent) for path in sorted(Path(tempfile.gettempdir()).glob("elastic-*/live.json"))]
