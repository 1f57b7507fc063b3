"""The possible victims of a fault: the members of the newest view, as listed in the run directory, and a pidfd of each of them."""

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
    """The workers of the view of this epoch as (worker, pid), by place; `forkserver` is the pid of their parent, None if unknown."""

    epoch: int
    members: tuple[tuple[int, int], ...]
    forkserver: int | None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Roster:
        members = tuple((member["worker"], member["pid"]) for member in data["members"])
        return cls(data["epoch"], members, data.get("forkserver"))


class RosterFile:
    """Reads members.json, again whenever it was replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, int] | None = None
        self._roster: Roster | None = None

    def read(self) -> Roster | None:
        """Returns the newest view; None before the first."""
        with suppress(FileNotFoundError):
            stat = self._path.stat()
            version = stat.st_ino, stat.st_mtime_ns
            if version != self._version:
                self._roster = Roster.from_json(json.loads(self._path.read_text()))
                self._version = version
        return self._roster


class Victim:
    """One worker, observed through shared memory and signalled through a pidfd, so that no later process with its pid is hit."""

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
        """Returns the worker's activity, or its last one; None if it has recorded none."""
        if self._watch is None:
            with suppress(FileNotFoundError):
                self._watch = ActivityReader(self._directory, self.worker)
        doing = None if self._watch is None else self._watch.read()
        if doing is None or doing.pid != self.pid:
            return None
        self.pace.see(doing)
        return doing

    def ended(self, patience_s: float = 0.0) -> bool:
        """Whether the worker is dead, or dies within `patience_s` seconds."""
        return self._pidfd is None or bool(self._end.poll(patience_s * 1000))

    def kill(self) -> None:
        """Sends SIGKILL, which also ends a stopped process."""
        self.send(signal.SIGKILL)

    def send(self, number: int) -> None:
        """Sends a signal such as SIGSTOP, if the worker is not dead yet."""
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Closes the pidfd and the activity reader. May be called again."""
        if self._watch is not None:
            self._watch.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._watch = self._pidfd = None


def _hold(pid: int, parent: int | None) -> int | None:
    """Returns a pidfd of the process; None if the process is gone, or if the pid on this host belongs to no child of `parent`."""
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
