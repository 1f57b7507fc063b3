"""What this host has for the workers of a job: processors and memory, within the limits of its control group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")


def processors() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS, group: Path = Path("/proc/self/cgroup")) -> int | None:
    """The machine's, or the least limit of a control group that this process is in; None where nobody says."""
    found = [*_total(meminfo), *_limits(groups, group)]
    return min(found, default=None)


def _total(meminfo: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                yield int(line.split()[1]) * 1024


def _limits(groups: Path, group: Path) -> Iterator[int]:
    """Of all groups from this process's own up to the root."""
    own = ""
    with suppress(OSError):
        own = next((line.split("::", 1)[1] for line in group.read_text().splitlines() if line.startswith("0::")), "")
    path = groups / own.lstrip("/")
    for folder in (path, *path.parents):
        if not folder.is_relative_to(groups):
            return
        for name in _LIMITS:
            with suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / name).read_text())


def anonymous_bytes(status: Path = Path("/proc/self/status")) -> int:
    """What this process has in memory that no file backs; 0 where nobody says."""
    with suppress(OSError, ValueError, IndexError):
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
