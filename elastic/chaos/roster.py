"""Whom a fault can hit: the members of the newest view as the run directory names them, and a hold on each of their processes."""

from __future__ import annotations

import json
import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.chaos.trigger import StepPace
from elastic.observe.activity import ActivityReader, Doing


@dataclass(frozen=True, slots=True)
class Roster:
    """The workers of the view of this epoch as (worker, pid), by place; `forkserver` is the parent of all, None where it is not known."""

    epoch: int
    members: tuple[tuple[int, int], ...]
    forkserver: int | None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Roster:
        members = tuple((member["worker"], member["pid"]) for member in data["members"])
        return cls(data["epoch"], members, data.get("forkserver"))


class RosterFile:
    """Reads members.json again whenever it was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int] | None = None
        self._roster: Roster | None = None

    def read(self) -> Roster | None:
        """The newest view that there was; None before the first."""
        with suppress(FileNotFoundError):
            stat = self._path.stat()
            version = stat.st_ino, stat.st_mtime_ns
            if version != self._version:
                self._roster = Roster.from_json(json.loads(self._path.read_text()))
                self._version = version
        return self._roster


class Victim:
    """One worker: looked at, and killed, through a descriptor of its process, so that nobody who gets its pid later is hit."""

    def __init__(self, directory: Path, worker: int, pid: int, parent: int | None) -> None:
        self.worker, self.pid = worker, pid
        self.pace = StepPace()
        self._directory = directory
        self._watch: ActivityReader | None = None
        self._pidfd = _hold(pid, parent)
        self._end = select.poll()
        if self._pidfd is not None:
            self._end.register(self._pidfd, select.POLLIN)

    def look(self) -> Doing | None:
        """What it does, or did last; None where it has not said so."""
        if self._watch is None:
            with suppress(FileNotFoundError):
                self._watch = ActivityReader(self._directory, self.worker)
        doing = None if self._watch is None else self._watch.read()
        if doing is None or doing.pid != self.pid:
            return None
        self.pace.see(doing)
        return doing

    def ended(self, patience_s: float = 0.0) -> bool:
        """Whether it is dead, or dies within this time."""
        return self._pidfd is None or bool(self._end.poll(patience_s * 1000))

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped process."""
        self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        """Sends a signal such as SIGSTOP, to whoever is not dead yet."""
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Lets go of the process. May be called again."""
        if self._watch is not None:
            self._watch.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._watch = self._pidfd = None


def _hold(pid: int, parent: int | None) -> int | None:
    """A descriptor of the process; None if it is gone, or the pid is no longer, or on this host not, that of a child of `parent`."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    found = None
    with suppress(OSError):
        found = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    if parent is None or found == parent:
        return pidfd
    os.close(pidfd)
    return None
