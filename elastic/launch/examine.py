"""Examines this machine for jobs: its limits, its memory and processors, Python, torch and etcd. Each finding says what to do."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic.errors import EtcdUnavailable
from elastic.host.facts import HostFacts
from elastic.host.limits import SystemLimits, in_mb, process_limit
from elastic.host.measures import available_bytes, unwritable
from elastic.host.process import module_command
from elastic.launch.limits import JobLimits
from elastic.membership.server import find_etcd
from elastic.settings import own_environment, worker_environment

OK, WARNING, ERROR = "ok", "warning", "error"

_SHM_BYTES = 128_000_000
_PYTHON = (3, 10)
_GLIBC = (2, 35)
_TORCH_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One finding: `level` is OK, WARNING (a job runs, and misses something) or ERROR (it cannot run); `advice` is what to do."""

    what: str
    level: str
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def machine(directory: Path, workers: int, threads: int, *, own_etcd: bool) -> Iterator[Finding]:
    """Examines this machine for a job with its run directory there. With `own_etcd` the job starts a private etcd."""
    yield _python()
    yield from _etcd(directory, own_etcd=own_etcd)
    small = JobLimits.here(str(directory)).too_small(workers)
    files = process_limit(resource.RLIMIT_NOFILE, hard=True)
    yield _judged("limits", small, f"{'any number of' if files is None else files} open files, address space and disk are enough")
    bad = unwritable(directory)
    yield _judged("run directory", bad and f"{bad}: make it writable, or use TMPDIR or directory=", f"{directory} can be written")
    yield _processors(workers, threads)
    yield _memory(workers)
    yield _segments()
    yield _huge_pages()
    yield _shared_memory()
    yield _locked()


def computed(threads: int, isa: str) -> tuple[Finding, dict[str, Any]]:
    """Starts torch with the numeric environment of a job, and returns what `worker.node_check` measures; `{}` if that fails."""
    environment = {**own_environment(), **worker_environment(threads, isa)}
    command = module_command("elastic.worker.node_check", str(threads))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=_TORCH_S)
    except subprocess.TimeoutExpired:
        return Finding(
            what="torch", level=ERROR, found=f"it was not imported within {_TORCH_S:g} s", advice="look at disk and processors"
        ), {}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"])[-1]
        return Finding(what="torch", level=ERROR, found=last, advice="install torch 2.9 or newer for this Python and processor"), {}
    found = json.loads(done.stdout.splitlines()[-1])
    version, product = found["fingerprint"]["torch"], found["product"][:12]
    text = f"{version}, {isa}, {threads} thread{'s' * (threads != 1)}: a test product has the digest {product}"
    return Finding(what="torch", level=OK, found=text), found


def _judged(what: str, wrong: str | None, right: str, level: str = ERROR) -> Finding:
    """Returns a finding from a sentence `wrong`, which ends with what to do after a colon, or from `right` without one."""
    if not wrong:
        return Finding(what=what, level=OK, found=right)
    found, _, advice = wrong.rpartition(": ")
    return Finding(what=what, level=level, found=found, advice=advice)


def _python() -> Finding:
    version, wanted = platform.python_version(), ".".join(map(str, _PYTHON))
    old = f"{version} is too old: use Python {wanted} or newer" if sys.version_info[:2] < _PYTHON else None
    return _judged("Python", old, f"{version}, {sys.executable}")


def _etcd(directory: Path, *, own_etcd: bool) -> Iterator[Finding]:
    level = ERROR if own_etcd else OK
    try:
        yield Finding(what="etcd binary", level=OK, found=find_etcd())
    except EtcdUnavailable as error:
        yield _judged("etcd binary", str(error), "", level)
        return
    yield _judged("private etcd", SystemLimits.of_this_process(directory).too_small(), "the limits are enough for one", level)


def _processors(workers: int, threads: int) -> Finding:
    have, wanted = HostFacts.here().processors, workers * threads
    few = f"{have} for {workers} workers with {threads} threads each: start fewer workers or threads; they get in each other's way"
    return _judged("processors", few if have < wanted else None, f"{have} for {workers} workers x {threads}", WARNING)


def _memory(workers: int) -> Finding:
    memory, free = HostFacts.here().memory, available_bytes()
    if memory is None or free is None:
        return Finding(what="memory", level=WARNING, found="its size is not known", advice="give memory= to elastic.run")
    each = f"{in_mb(free)} free of {in_mb(memory)}, {in_mb(free // workers)} for each of {workers} workers"
    little = f"{each}: torch alone takes 300 MB; free some, or start fewer workers" if free // workers < 300_000_000 else None
    return _judged("memory", little, each, WARNING)


def _segments() -> Finding:
    limit = process_limit(resource.RLIMIT_FSIZE)
    try:
        os.close(os.memfd_create("elastic-doctor", os.MFD_CLOEXEC))
    except (OSError, AttributeError) as error:
        why = f"memfd_create fails ({error}), so state cannot outlive its worker: allow it in the container's seccomp profile"
        return _judged("memory that outlives workers", why, "", WARNING)
    small = None if limit is None else f"files and memory that outlives workers may have {in_mb(limit)}: raise `ulimit -f`"
    return _judged("memory that outlives workers", small, "memfd works, without a limit of size", WARNING)


def _huge_pages() -> Finding:
    what, glibc = "huge pages", platform.libc_ver()
    with suppress(OSError, ValueError):
        mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().partition("[")[2].partition("]")[0]
        if mode == "never":
            why = "they are off, which makes memory dearer: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
            return _judged(what, why, "", WARNING)
        if glibc[0] == "glibc" and tuple(map(int, glibc[1].split(".")[:2])) < _GLIBC:
            return Finding(what=what, level=OK, found=f"{mode}, but glibc {glibc[1]} does not ask for them (2.35 does)")
        return Finding(what=what, level=OK, found=f"{mode}, glibc {glibc[1]}")
    return Finding(what=what, level=OK, found="it is not known whether there are any")


def _shared_memory() -> Finding:
    try:
        disk = os.statvfs("/dev/shm")
    except OSError as error:
        why = f"/dev/shm: {error.strerror}, which data loaders with processes need: mount it"
        return _judged("shared memory", why, "", WARNING)
    free = disk.f_bavail * disk.f_frsize
    little = f"/dev/shm has {in_mb(free)} free, and data loaders with processes need more: start the container with --shm-size"
    return _judged("shared memory", little if free < _SHM_BYTES else None, f"/dev/shm has {in_mb(free)} free", WARNING)


def _locked() -> Finding:
    limit = process_limit(resource.RLIMIT_MEMLOCK)
    text = "any amount" if limit is None else in_mb(limit)
    small = limit is not None and limit < 64_000_000 and Path("/dev/nvidiactl").exists()
    why = f"{text} may be locked, and copies to a GPU need more: raise `ulimit -l`" if small else None
    return _judged("locked memory", why, f"{text} may be locked", WARNING)
