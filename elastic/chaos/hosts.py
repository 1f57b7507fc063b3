"""The hosts of a job, seen from outside: their processes, and what their run directories say of members and incidents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.observe.activity import Doing, read
from elastic.observe.json_lines import read_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """A process's line in /proc: state, parent, and processor seconds."""

    state: str
    parent: int
    cpu_s: float


def stat_of(pid: int) -> Stat | None:
    """Returns what /proc says of a process; None if it has ended."""
    with suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if words[0] not in "ZX":
            ticks = os.sysconf("SC_CLK_TCK")
            return Stat(state=words[0], parent=int(words[1]), cpu_s=(int(words[11]) + int(words[12])) / ticks)
    return None


def tree_cpu_s(pid: int) -> float:
    """Processor seconds of a process, of all that descend from it, and of those that have ended and been waited for."""
    seconds, left = 0.0, [pid]
    while left:
        each = left.pop()
        with suppress(OSError, IndexError):
            words = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            seconds += sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")
            left += children_of(each)
    return seconds


def children_of(pid: int) -> list[int]:
    """The children of a process, by any of its threads."""
    found = list[int]()
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def send(pid: int, number: int) -> bool:
    """Sends a signal; returns whether there was such a process."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A member of the newest view that can be hit: its number, its place in the view, its process, and the host that it runs on."""

    worker: int
    place: int
    pid: int
    host: Host

    def doing(self) -> Doing | None:
        """What it is doing, or did last."""
        found = read(self.host.run, self.worker)
        return found if found is not None and found.pid == self.pid else None


@dataclass
class Host:
    """One host: its number, the folder of its files, its run directory, and the process of `elastic run` or `elastic agent` on it.

    `codes` are the exit codes of its processes, one after another. `expected`: it has ended, and is not started again.
    """

    number: int
    folder: Path
    run: Path
    process: subprocess.Popen[bytes]
    expected: bool = False
    cut: bool = False
    codes: list[int] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """What its processes said."""
        return self.folder / "log"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def members(self) -> dict[str, Any]:
        """The newest view that this host knows; epoch 0 before the first."""
        with suppress(OSError, ValueError):
            return json.loads((self.run / "members.json").read_text())
        return {"epoch": 0, "members": [], "forkserver": None, "agent": None}

    @property
    def agent(self) -> int | None:
        """The process of its agent, while it lives."""
        pid = self.members.get("agent")
        found = None if pid is None else stat_of(pid)
        return pid if found is not None and found.parent == self.process.pid else None

    @property
    def incidents(self) -> list[dict[str, Any]]:
        with suppress(OSError):
            return read_lines(self.run / "incidents.jsonl")
        return []

    def targets(self) -> list[Target]:
        """Its members of the newest view, with their processes."""
        known = self.members
        found = []
        for place, each in enumerate(known["members"]):
            process = None if each["pid"] is None else stat_of(each["pid"])
            if process is not None and process.parent == known["forkserver"]:
                found.append(Target(worker=each["worker"], place=place, pid=each["pid"], host=self))
        return found

    def joiners(self) -> list[int]:
        """The processes of workers here that are no members yet."""
        known = self.members
        if known["forkserver"] is None:
            return []
        members = {each["pid"] for each in known["members"]}
        return [pid for pid in children_of(known["forkserver"]) if pid not in members and stat_of(pid) is not None]

    def kill(self) -> None:
        """Ends all its processes at once: agent, and with it the workers, and launcher."""
        agent = self.agent
        if agent is not None:
            send(agent, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@contextmanager
def held(pid: int) -> Iterator[int]:
    """A descriptor of a process, so that no other process with its number is signalled. Raises ProcessLookupError."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
