"""The resources of this host for the workers of a job: processors and memory, within the limits of its control group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What a host has for workers: processors, bytes of memory (None if unknown); and the rack in which it stands, None if nobody said."""

    processors: int
    memory: int | None = None
    rack: str | None = None

    @classmethod
    def here(cls, rack: str | None = None) -> HostFacts:
        """Returns the facts of this host, which stands in this rack."""
        return cls(processors=processors(), memory=memory_bytes(), rack=rack)


_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory.limit_in_bytes")


def processors() -> int:
    """Returns how many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS, group: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns the machine's memory, or the least limit of this process's control groups; None if neither can be read."""
    found = [*_total(meminfo), *_limits(groups, group)]
    return min(found, default=None)


def _total(meminfo: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                yield int(line.split()[1]) * 1024


def _limits(groups: Path, group: Path) -> Iterator[int]:
    """Yields the memory limits of all groups from this process's own up to the root."""
    for folder in control_groups(groups, group):
        for name in _LIMITS:
            with suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / name).read_text())


def control_groups(groups: Path, group: Path) -> Iterator[Path]:
    """Yields the folders of this process's control groups that may limit memory, of which `group` has the names, and of those around them.

    They are those of version 2, up to `groups`, and of version 1, up to `groups/memory`.
    """
    tops = {groups: "", groups / "memory": ""}
    with suppress(OSError, ValueError):
        for line in group.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                tops[groups / "memory" if controllers else groups] = name
    for top, name in tops.items():
        path = top / name.lstrip("/")
        yield from (folder for folder in (path, *path.parents) if folder.is_relative_to(top))


def anonymous_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Returns the bytes of this process in memory that no file backs; 0 if they cannot be read."""
    with suppress(OSError, ValueError, IndexError):
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
