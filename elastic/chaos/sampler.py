"""Watches a running job from outside, in a thread: what its workers do, which views its hosts know, and what its processes use."""

from __future__ import annotations

import os
import re
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.chaos.hosts import Host, stat_of, tree_cpu_s
from elastic.chaos.running import RunningJob
from elastic.errors import SettingsError
from elastic.observe.activity import RECOVERY_PHASES, STEP_PHASES, ActivityReader, Doing

_EVERY_S, _LIST_S, _USE_S = 0.01, 0.25, 1.0
_ACTS = ("apply", "gather", "replicate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one process of the job used at a moment: threads, open descriptors, and processor seconds since it began.

    `watched`: processes that it holds (an agent its workers, spares too). `stale`: open files of /proc of processes that have ended.
    """

    at: float
    pid: int
    role: str
    members: int
    threads: int
    descriptors: int
    cpu_s: float
    watched: int = 0
    stale: int = 0


def _descriptors(pid: int) -> dict[str, int]:
    """The open descriptors of a process: counts of a `Use`.

    Files of /proc do not count: an agent keeps some for each thread of its workers, and as threads come and go, their number says nothing
    of a leak. Those of processes that have ended do.
    """
    opened, folder = list[str](), f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with suppress(OSError):
            opened.append(os.readlink(f"{folder}/{name}"))
    processes = [int(path.split("/")[2]) for path in opened if re.match(r"/proc/\d+/", path)]
    others = [path for path in opened if not path.startswith("/proc/")]
    stale = sum(not os.path.exists(f"/proc/{each}") for each in processes)
    return {"descriptors": len(others), "watched": others.count("anon_inode:[pidfd]"), "stale": stale}


@dataclass
class Seen:
    """What was seen. `views` has `(time, host, epoch, workers)` for each change; `incidents` has those
    that each host recorded, in all runs of the job; `breaches` are sentences about workers that acted for an
    epoch after they had sent their inventory for the next; `machine` has `(time, seconds that all processors of
    the machine have computed)`, and `own` the seconds that the harness and all processes of the job have, at the same
    times; `looks` counts how often all workers were looked at, and `read` the workers that were seen to do something
    then; `unreadable` are errors of reading logs of incidents; `broken` is the error that ended the watch early."""

    views: list[tuple[float, int, int, tuple[int, ...]]] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    machine: list[tuple[float, float]] = field(default_factory=list)
    own: list[tuple[float, float]] = field(default_factory=list)
    incidents: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    broken: str | None = None
    looks: int = 0
    read: int = 0
    cpu_s: float = 0.0


@dataclass
class Promises:
    """Finds workers that act for an epoch after their inventory for the next. Pure: what is seen of a worker goes in."""

    _promised: dict[int, int] = field(default_factory=dict)
    _looked: dict[int, Doing] = field(default_factory=dict)

    def look(self, doing: Doing) -> str | None:
        """Takes the activity of a worker; returns a sentence if it breaks its promise."""
        if self._looked.get(doing.pid) == doing:
            return None
        self._looked[doing.pid] = doing
        if doing.phase in RECOVERY_PHASES and doing.phase != "quiesce":  # behind the inventory
            self._promised[doing.pid] = max(doing.epoch, self._promised.get(doing.pid, 0))
        elif doing.phase in _ACTS and doing.epoch <= self._promised.get(doing.pid, 0):
            return (
                f"worker {doing.worker} was in {doing.phase} of step {doing.step} for epoch {doing.epoch}, after its inventory for the next"
            )
        return None


class Sampler:
    """Watches until it is closed. `step` is the newest step of any worker that lives, `highest` the newest of all, `first_at` when the
    first step was seen, `moved_at` when there was a new one last."""

    def __init__(self, job: RunningJob) -> None:
        self.seen = Seen()
        self.step, self.highest, self.first_at, self.moved_at = -1, -1, None, time.monotonic()
        self._job, self._promises = job, Promises()
        self._readers: dict[tuple[int, int], tuple[int, ActivityReader]] = {}
        self._known: dict[int, Any] = {}
        self._ended: dict[tuple[int, int], int] = {}  # records of workers that have ended, which change no more
        self._incidents: dict[int, tuple[int, Any]] = {}
        self._logs: dict[int, tuple[int, int, int]] = {}  # by host: what shows that its log of incidents is as it was
        self._lists_at = self._uses_at = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="elastic-chaos-sampler", daemon=True)
        self._thread.start()

    first_at: float | None

    def close(self) -> None:
        """Ends it."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:  # the thread's boundary: nothing can be said of a run that nobody watched
            self.seen.broken = traceback.format_exc(limit=-3)
        self.seen.cpu_s = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
        for _, reader in self._readers.values():
            reader.close()

    def _watch(self) -> None:
        while not self._closing.wait(_EVERY_S):
            now = time.monotonic()
            self.seen.looks += 1
            if now - self._lists_at >= _LIST_S:
                self._lists_at = now
                self._list()
            self._look(now)
            if now - self._uses_at >= _USE_S:
                self._uses_at = now
                self._use(now)
        self._list()

    def _list(self) -> None:
        """Opens the activity records of new workers, and notes new views."""
        for host in list(self._job.hosts):
            folder = host.run / "activity"
            with suppress(OSError):
                for name in os.listdir(folder):
                    if name.isdigit():
                        self._open(host, folder, int(name))
            self._drop_ended(host)
            members = host.members
            view = (members["epoch"], tuple(each["worker"] for each in members["members"]))
            self._note_incidents(host)
            if view[0] and self._known.get(host.number) != view:
                self._known[host.number] = view
                self.seen.views.append((time.monotonic(), host.number, *view))

    def _note_incidents(self, host: Host) -> None:
        """Notes new incidents: a job that is started again removes those of the one before, and another agent writes the log anew."""
        with suppress(OSError):
            stat = (host.run / "incidents.jsonl").stat()
            state = stat.st_ino, stat.st_size, stat.st_mtime_ns
            if self._logs.get(host.number) == state:
                return
            self._logs[host.number] = state
        try:
            found = host.incidents
        except SettingsError as error:
            self.seen.unreadable += [] if str(error) in self.seen.unreadable else [str(error)]
            return
        count, last = self._incidents.get(host.number, (0, None))
        if len(found) < count or (count and found[count - 1] != last):
            count = 0
        known = self.seen.incidents.setdefault(host.number, [])
        known += [each for each in found[count:] if each not in known]
        self._incidents[host.number] = len(found), found[-1] if found else None

    def _open(self, host: Host, folder: Path, worker: int) -> None:
        inode, key = (folder / str(worker)).stat().st_ino, (host.number, worker)
        if self._ended.get(key) == inode or (key in self._readers and self._readers[key][0] == inode):
            return
        if key in self._readers:
            self._readers.pop(key)[1].close()
        with suppress(OSError, ValueError):
            self._readers[key] = inode, ActivityReader(host.run, worker)

    def _drop_ended(self, host: Host) -> None:
        """Stops reading what workers of a host did that have ended: in a long run these would be many."""
        for key, (inode, reader) in list(self._readers.items()):
            if key[0] == host.number and reader.pid and stat_of(reader.pid) is None:
                self._take(reader)  # the last one may be new
                self._ended[key] = inode
                self._readers.pop(key)[1].close()

    def _take(self, reader: ActivityReader) -> Doing | None:
        doing = reader.read()
        breach = None if doing is None else self._promises.look(doing)
        if breach is not None:
            self.seen.breaches.append(breach)
        return doing

    def _look(self, now: float) -> None:
        newest = -1
        for _, reader in self._readers.values():
            doing = self._take(reader)
            if doing is None:
                continue
            self.seen.read += 1
            if doing.phase in STEP_PHASES and now - doing.at < 60.0:
                newest = max(newest, doing.step)
        if newest != self.step:
            self.step, self.moved_at, self.highest = newest, now, max(newest, self.highest)
        if self.first_at is None and newest >= 0:
            self.first_at = now

    def _use(self, now: float) -> None:
        with suppress(OSError, ValueError, IndexError):
            ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
            idle = ticks[3] + ticks[4]
            self.seen.machine.append((now, (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")))
            self.seen.own.append((now, tree_cpu_s(os.getpid())))
        for host in self._job.present:
            members = host.targets()
            agent = host.agent
            pids = [(target.pid, f"worker {target.worker}") for target in members]
            pids += [] if agent is None else [(agent, "agent")]
            for pid, role in pids:
                with suppress(OSError):
                    stat = stat_of(pid)
                    if stat is not None:
                        counts = {"members": len(host.members["members"]), "threads": len(os.listdir(f"/proc/{pid}/task"))}
                        counts |= _descriptors(pid)
                        self.seen.uses.append(Use(at=now, pid=pid, role=role, cpu_s=stat.cpu_s, **counts))
