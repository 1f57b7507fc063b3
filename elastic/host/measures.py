"""Measures of this host that depend on no clock: free memory, what other machines take of its processors, whether it can write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from elastic.host.facts import control_groups

_GROUPS = Path("/sys/fs/cgroup")
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of control groups of version 2 and 1: the files of the limit and of what is used, and the line of memory.stat for the page cache."""

_TRIAL_BYTES = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS, group: Path = Path("/proc/self/cgroup")) -> int | None:
    """Returns the bytes of memory that processes of this control group can still take, without the page cache; None if unknown."""
    return min([*_free(meminfo), *_left(groups, group)], default=None)


def _free(meminfo: Path) -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _left(groups: Path, group: Path) -> Iterator[int]:
    """Yields what the limits of this process's control group, and of those around it, leave."""
    for folder in control_groups(groups, group):
        for names in _MEMORY:
            with suppress(OSError, ValueError):  # "max" is no limit
                limit, used = (int((folder / name).read_text()) for name in names[:2])
                stat = (line.partition(" ") for line in (folder / "memory.stat").read_text().splitlines())
                cache = [value for name, _, value in stat if name == names[2]]
                yield max(0, limit - used + int(cache[0] if cache else 0))


class Steal:
    """The part of the processors' time since it was made that other machines on the same hardware have taken."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = self._read()

    def part(self) -> float | None:
        """Returns it, None if it is unknown."""
        now, before = self._read(), self._before
        passed = None if now is None or before is None else [one - other for one, other in zip(now, before, strict=True)]
        return None if passed is None or sum(passed) <= 0 else passed[7] / sum(passed)

    def _read(self) -> list[int] | None:
        with suppress(OSError, ValueError):
            words = self._stat.read_text().splitlines()[0].split()
            return [int(word) for word in words[1:9]] if len(words) > 8 else None
        return None


def resident_bytes(process: int | str = "self") -> int:
    """Returns the bytes of a process that are in memory, with those that it shares; 0 if they cannot be read."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{process}/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0


def unwritable(directory: Path) -> str:
    """Returns why no file can be written in a directory, an empty text if one can."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            file.write(bytes(_TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{directory}: {error.strerror or error}"
    return ""
