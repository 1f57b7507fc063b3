"""Observes the workers of this host: their activity records, and what /proc says about their processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from elastic.agent.supervision import WorkerProcess
from elastic.health.evidence import Observed, Usage
from elastic.health.waiting import MUTE_S
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
        self._families = _Families()
        self._quotas = Quotas()
        self._sleeps: dict[int, dict[str, int]] = {}  # of each process: how often each thread has gone to sleep until the last look

    def look(self, workers: Iterable[WorkerProcess]) -> list[Observed]:
        """Returns an observation of each worker."""
        return [self._observed(worker) for worker in workers]

    def forget(self, worker: int) -> None:
        """Closes what is open for a worker that has ended."""
        if (reader := self._readers.pop(worker, None)) is not None:
            self._quotas.forget(reader.pid)
            self._sleeps.pop(reader.pid, None)
            reader.close()

    def doing(self, worker: WorkerProcess) -> Doing | None:
        """Returns the worker's last activity, None if it left no record in this job."""
        reader = self._reader(worker)
        doing = None if reader is None else reader.read()
        return doing if doing is not None and doing.pid == worker.pid and doing.epoch else None

    def _observed(self, worker: WorkerProcess) -> Observed:
        doing, reader = self.doing(worker), self._reader(worker)
        standing = None if reader is None else reader.standing(doing)
        now = time.monotonic()
        age_s = 0.0 if doing is None else now - doing.at
        mute_s = now - reader.pulse_at if reader is not None and reader.pulse_at else 0.0
        return Observed(
            worker=worker.number,
            pid=worker.pid,
            seen_at=now,
            moment=f"{worker.pid} {doing} {standing}",
            state=_state(worker.pid),
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
            folder = Path(f"/proc/{pid}")
            ran, delayed = _schedule(folder)
            cpu_s, running, wakes, self._sleeps[pid] = _threads(folder, self._sleeps.get(pid, {}) if mute else None)
            others_s, others_running = self._families.of(pid)
            io = dict(line.split(": ") for line in (folder / "io").read_text().splitlines())
            return Usage(
                ran_s=ran,
                delayed_s=delayed,
                cpu_s=cpu_s + others_s,
                io_bytes=sum(int(io[name]) for name in ("rchar", "wchar", "read_bytes")),
                running=running or others_running,
                wakes=wakes,
                wchan=(folder / "wchan").read_text(),
            )
        return None


class _Families:
    """The processor time of the descendants of processes. All processes of the host are read for this, so only now and then."""

    def __init__(self) -> None:
        self._read_at = 0.0
        self._children: dict[int, list[tuple[int, float, bool]]] = {}

    def of(self, pid: int) -> tuple[float, bool]:
        """Returns the seconds that living descendants have used, and whether one of them runs."""
        now = time.monotonic()
        if now - self._read_at >= _FAMILIES_EVERY_S:
            self._read_at, self._children = now, _processes()
        total, running, found = 0.0, False, [pid]
        while found:
            for child, seconds, runs in self._children.get(found.pop(), ()):
                total, running = total + seconds, running or runs
                found.append(child)
        return total, running


def _processes() -> dict[int, list[tuple[int, float, bool]]]:
    """Returns each parent's children: process, processor seconds, whether it runs."""
    children: dict[int, list[tuple[int, float, bool]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, ValueError, IndexError):
                fields = _fields(f"/proc/{entry}/stat")
                children.setdefault(int(fields[1]), []).append((int(entry), _cpu_s(fields), fields[0] == "R"))
    return children


def _state(pid: int | None) -> str:
    with suppress(OSError, IndexError):
        return _fields(f"/proc/{pid}/stat")[0]
    return ""


def _fields(path: str) -> list[str]:
    """Returns the fields of a file `stat` from the state on."""
    with open(path, "rb") as file:
        return file.read().decode(errors="replace").rpartition(")")[2].split()


def _cpu_s(fields: list[str]) -> float:
    """Processor seconds of all threads, and of children that were waited for."""
    return _TICK_S * sum(map(int, fields[11:15]))


def _schedule(folder: Path) -> tuple[float, float]:
    """Returns how long the first thread has run, and waited for a processor. Kernels without these figures count ticks."""
    with suppress(OSError, ValueError):
        ran, delayed, _ = (folder / "schedstat").read_text().split()
        return int(ran) * _NANOSECOND, int(delayed) * _NANOSECOND
    return _TICK_S * sum(map(int, _fields(f"{folder}/task/{folder.name}/stat")[11:13])), 0.0


def _threads(folder: Path, before: dict[str, int] | None = None) -> tuple[float, bool, int, dict[str, int]]:
    """Returns the processor seconds of a process, whether one of its threads runs or is runnable, and how often they began to run.

    With `before`, how often each thread had gone to sleep at the last look, it returns these counts now too, and a thread does not count
    as running that has gone to sleep _POLLS times since: it waits for something that it looks for again and again, as for the interpreter
    lock. One that lacks a processor sleeps less often.
    """
    running, wakes, sleeps = False, 0, dict[str, int]()
    for thread in os.listdir(folder / "task"):
        with suppress(OSError, IndexError, ValueError):  # it has ended, or the kernel does not count
            polls = False
            if before is not None:
                sleeps[thread] = _sleeps(folder / "task" / thread)
                polls = thread in before and sleeps[thread] - before[thread] >= _POLLS
            running = running or (_fields(f"{folder}/task/{thread}/stat")[0] == "R" and not polls)
            wakes += int((folder / "task" / thread / "schedstat").read_text().split()[2])
    return _cpu_s(_fields(f"{folder}/stat")), running, wakes, sleeps


def _sleeps(folder: Path) -> int:
    """Returns how often a thread has gone to sleep by itself."""
    for line in (folder / "status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches:"):
            return int(line.split()[1])
    return 0
