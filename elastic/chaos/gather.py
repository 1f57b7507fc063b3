"""Reads the evidence of a run that is over: workers' notes, how hosts ended, and what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from elastic.chaos.evidence import HostEnd, Left, WorkerNotes
from elastic.chaos.hosts import stat_of
from elastic.chaos.own_etcd import OwnEtcd
from elastic.chaos.running import RunningJob
from elastic.host.rundir import TEMPORARY

_GONE_S, _POLL_S = 8.0, 0.05
_LOG_BYTES = 200_000


def worker_notes(folder: Path) -> tuple[WorkerNotes, ...]:
    """Reads the notes of all workers."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text().split("\n")[:-1]
        with suppress(ValueError):
            found.append(WorkerNotes.of(map(json.loads, lines)))
    return tuple(each for each in found if each is not None)


def host_ends(job: RunningJob) -> tuple[HostEnd, ...]:
    """How each host ended, with the end of its log."""
    found = []
    for host in job.hosts:
        log = ""
        with suppress(OSError):
            log = host.log.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
        found.append(HostEnd(number=host.number, codes=tuple(host.codes), log=log))
    return tuple(found)


def marked(mark: str) -> dict[int, str]:
    """Live processes whose environment has this mark: command line by process."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            pid = int(entry.name)
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0") and stat_of(pid) is not None:
                found[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
    return found


def remove(folder: Path, temporary: Path) -> None:
    """Removes the folder of a run. What was interrupted may still write there: first its processes end, whose TMPDIR is `temporary`."""
    deadline = time.monotonic() + _GONE_S
    while marked(f"TMPDIR={temporary}") and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    shutil.rmtree(folder, ignore_errors=True)


def left_behind(job: RunningJob, etcd: OwnEtcd | None) -> Left:
    """What a job that is over has left, some seconds after its end."""
    mark, deadline = f"TMPDIR={job.disk / 'tmp'}", time.monotonic() + _GONE_S
    while True:
        left = _left_now(job, etcd, mark)
        if left == Left() or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_S)


def _left_now(job: RunningJob, etcd: OwnEtcd | None, mark: str) -> Left:
    processes = tuple(f"{pid}: {command}" for pid, command in marked(mark).items())
    files = [str(path.relative_to(job.disk)) for path in (job.disk / "tmp").iterdir()]
    for host in job.hosts:
        if host.codes and host.run.exists() and host.codes[-1] in (0, 130):  # one that was killed could remove nothing
            files += [str(path.relative_to(job.disk)) for path in host.run.iterdir() if path.name in TEMPORARY]
    keys, leases, unread = tuple[str, ...](), 0, ""
    if etcd is not None:
        try:
            keys = tuple(key for key in etcd.keys("/elastic/") if "/ended/" not in key)
            leases = len(etcd.call("lease/leases").get("leases", ())) if not etcd.keys("/elastic/") else 0
        except OSError as error:
            unread = str(error)
    return Left(processes=processes, files=tuple(files), keys=keys, leases=leases, unread=unread)


def history(etcd: OwnEtcd | None) -> tuple[tuple[str, str | None], ...] | None:
    """All that was written to the harness's etcd for the job; None without one, or if it does not answer."""
    if etcd is None or etcd.pid is None:
        return None
    try:
        return tuple(etcd.history("/elastic/"))
    except OSError:
        return None
