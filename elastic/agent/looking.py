"""Observes the workers of this host: their activity records, and what /proc says about their processes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from elastic.agent.supervision import WorkerProcess
from elastic.health.evidence import Observed, Usage
from elastic.health.waiting import MUTE_S
from elastic.host.proc_files import ProcFiles
from elastic.host.quota import Quotas
from elastic.observe.activity import ActivityReader, Doing

_RECENT_S = 0.5  # of an activity that began so recently nothing more needs to be known
_FAMILIES_EVERY_S = 1.0
_POLLS = 4  # sleeps between two looks, 0.2 s or so: a thread that waits for the interpreter lock wakes every 5 ms
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_NANOSECOND = 1e-9


class Looker:
    """Observes workers repeatedly. `directory` is the run directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._readers: dict[int, ActivityReader] = {}
        self._forgotten: set[int] = set()
        self._families = _Families()
        self._quotas = Quotas()
        self._files: dict[int, ProcFiles] = {}  # by process
        self._sleeps: dict[int, dict[str, int]] = {}  # of each process: how often each thread has gone to sleep until the last look

    def look(self, workers: Iterable[WorkerProcess]) -> list[Observed]:
        """Returns an observation of each worker."""
        return [self._observed(worker) for worker in workers]

    def _shut(self, worker: WorkerProcess) -> None:
        if worker.number in self._forgotten:
            self.forget(worker)

    def forget(self, worker: WorkerProcess) -> None:
        """Closes what is open for a worker that has ended, also if it died before it had a record. It may be looked at again, and then
        nothing stays open."""
        self._forgotten.add(worker.number)
        if (reader := self._readers.pop(worker.number, None)) is not None:
            reader.close()
        if worker.pid is not None:
            self._quotas.forget(worker.pid)
            self._drop(worker.pid)

    def doing(self, worker: WorkerProcess) -> Doing | None:
        """Returns the worker's last activity, None if it left no record in this job."""
        reader = self._reader(worker)
        doing = None if reader is None else reader.read()
        self._shut(worker)
        return doing if doing is not None and doing.pid == worker.pid and doing.epoch else None

    def _observed(self, worker: WorkerProcess) -> Observed:
        doing, reader = self.doing(worker), self._reader(worker)
        standing = None if reader is None else reader.standing(doing)
        now = time.monotonic()
        age_s = 0.0 if doing is None else now - doing.at
        mute_s = now - reader.pulse_at if reader is not None and reader.pulse_at else 0.0
        self._shut(worker)
        return Observed(
            worker=worker.number,
            pid=worker.pid,
            seen_at=now,
            moment=f"{worker.pid} {doing} {standing}",
            state=self._state(worker.pid),
            doing=doing,
            standing=standing,
            age_s=age_s,
            mute_s=mute_s,
            usage=None if worker.pid is None or (doing is not None and age_s < _RECENT_S) else self._usage(worker.pid, mute_s >= MUTE_S),
            held=self._quotas.held(worker.pid, now),
        )

    def _reader(self, worker: WorkerProcess) -> ActivityReader | None:
        """Returns the reader of the worker's record, which the worker makes when it begins."""
        if worker.number not in self._readers and worker.pid is not None:
            with suppress(OSError, ValueError):  # not there yet, or not a record
                reader = ActivityReader(self._directory, worker.number)
                if reader.pid == worker.pid:
                    self._readers[worker.number] = reader
                else:
                    reader.close()
        return self._readers.get(worker.number)

    def _usage(self, pid: int, mute: bool) -> Usage | None:
        """Returns what a process has used. While it is `mute`, threads that only wait for the interpreter lock do not count as running."""
        with suppress(OSError, ValueError, IndexError):  # it has ended
            files = self._of(pid)
            ran, delayed = _schedule(files, pid)
            cpu_s, running, wakes, self._sleeps[pid] = _threads(files, self._sleeps.get(pid, {}) if mute else None)
            others_s, others_running = self._families.of(files, pid)
            io = dict(line.split(": ") for line in files.read("io").splitlines())
            return Usage(
                ran_s=ran,
                delayed_s=delayed,
                cpu_s=cpu_s + others_s,
                io_bytes=sum(int(io[name]) for name in ("rchar", "wchar", "read_bytes")),
                running=running or others_running,
                wakes=wakes,
                wchan=files.read("wchan"),
            )
        return None

    def _of(self, pid: int) -> ProcFiles:
        if pid not in self._files:
            self._files[pid] = ProcFiles(pid)
        return self._files[pid]

    def _drop(self, pid: int) -> None:
        self._sleeps.pop(pid, None)
        if (files := self._files.pop(pid, None)) is not None:
            files.close()

    def _state(self, pid: int | None) -> str:
        if pid is None:
            return ""
        try:
            return _split(self._of(pid).read("stat"))[0]
        except (OSError, IndexError):  # it has ended
            self._drop(pid)
            return ""


class _Families:
    """The processor time of the descendants of processes. If one has any, all processes of the host are read, so only now and then."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._children: dict[int, list[tuple[int, float, bool]]] = {}
        self._childless: dict[int, float] = {}  # when a process was seen to have no children

    def of(self, files: ProcFiles, pid: int) -> tuple[float, bool]:
        """Returns the seconds that living descendants have used, and whether one of them runs."""
        now = time.monotonic()
        if now - self._childless.get(pid, -math.inf) < _FAMILIES_EVERY_S:
            return 0.0, False
        if _has_no_children(files):
            self._childless[pid] = now
            return 0.0, False
        if now - self._read_at >= _FAMILIES_EVERY_S:
            self._read_at, self._children = now, _processes()
        total, running, found = 0.0, False, [pid]
        while found:
            for child, seconds, runs in self._children.get(found.pop(), ()):
                total, running = total + seconds, running or runs
                found.append(child)
        return total, running


def _has_no_children(files: ProcFiles) -> bool:
    """Returns whether a process is known to have no children: not all kernels tell."""
    try:
        return not any(files.read(f"task/{thread}/children").strip() for thread in files.threads())
    except OSError:
        return False


def _processes() -> dict[int, list[tuple[int, float, bool]]]:
    """Returns each parent's children: process, processor seconds, whether it runs."""
    children: dict[int, list[tuple[int, float, bool]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, ValueError, IndexError):
                fields = _fields(f"/proc/{entry}/stat")
                children.setdefault(int(fields[1]), []).append((int(entry), _cpu_s(fields), fields[0] == "R"))
    return children


def _fields(path: str) -> list[str]:
    """Returns the fields of a file `stat` from the state on."""
    with open(path, "rb") as file:
        return _split(file.read().decode(errors="replace"))


def _split(stat: str) -> list[str]:
    return stat.rpartition(")")[2].split()


def _cpu_s(fields: list[str]) -> float:
    """Processor seconds of all threads, and of children that were waited for."""
    return _TICK_S * sum(map(int, fields[11:15]))


def _schedule(files: ProcFiles, pid: int) -> tuple[float, float]:
    """Returns how long the first thread has run, and waited for a processor. Kernels without these figures count ticks."""
    with suppress(OSError, ValueError):
        ran, delayed, _ = files.read("schedstat").split()
        return int(ran) * _NANOSECOND, int(delayed) * _NANOSECOND
    return _TICK_S * sum(map(int, _split(files.read(f"task/{pid}/stat"))[11:13])), 0.0


def _threads(files: ProcFiles, before: dict[str, int] | None = None) -> tuple[float, bool, int, dict[str, int]]:
    """Returns the processor seconds of a process, whether one of its threads runs or is runnable, and how often they began to run.

    With `before`, how often each thread had gone to sleep at the last look, it returns these counts now too, and a thread does not count
    as running that has gone to sleep _POLLS times since: it waits for something that it looks for again and again, as for the interpreter
    lock. One that lacks a processor sleeps less often.
    """
    running, wakes, sleeps = False, 0, dict[str, int]()
    for thread in files.threads():
        with suppress(OSError, IndexError, ValueError):  # it has ended, or the kernel does not count
            polls = False
            if before is not None:
                sleeps[thread] = _sleeps(files, thread)
                polls = thread in before and sleeps[thread] - before[thread] >= _POLLS
            running = running or (_split(files.read(f"task/{thread}/stat"))[0] == "R" and not polls)
            wakes += int(files.read(f"task/{thread}/schedstat").split()[2])
    return _cpu_s(_split(files.read("stat"))), running, wakes, sleeps


def _sleeps(files: ProcFiles, thread: str) -> int:
    """Returns how often a thread has gone to sleep by itself."""
    for line in files.read(f"task/{thread}/status").splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    return 0
