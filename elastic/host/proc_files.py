"""Reads the files of a process in /proc again and again. Descriptors are kept, since to open such a file takes longer than to read it."""

from __future__ import annotations

import math
import os
import resource

from elastic.host.limits import process_limit

_SIZE = 4096  # the files that are read have less
_MOST = 64  # descriptors kept for each process
_SHARE = 1 / 2  # of the descriptors that this process may have: the rest is for what cannot do without


class ProcFiles:
    """The files of the process `pid`. When it has ended, `read` raises OSError, also if another process has its number by then."""

    def __init__(self, pid: int) -> None:
        self._folder = f"/proc/{pid}"
        self._kept: dict[str, int] = {}
        self._below = _SHARE * (process_limit(resource.RLIMIT_NOFILE) or math.inf)

    def read(self, name: str) -> str:
        """Returns the contents of a file, such as `stat` or `task/17/stat`. Raises OSError."""
        descriptor = self._kept.get(name)
        if descriptor is not None:
            return os.pread(descriptor, _SIZE, 0).decode(errors="replace")
        descriptor = os.open(f"{self._folder}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if len(self._kept) < _MOST and descriptor < self._below:  # the kernel gives the lowest free number
            self._kept[name] = descriptor
            return os.pread(descriptor, _SIZE, 0).decode(errors="replace")
        try:
            return os.pread(descriptor, _SIZE, 0).decode(errors="replace")
        finally:
            os.close(descriptor)

    def threads(self) -> list[str]:
        """Returns the numbers of the threads; lets go of the files of others. Raises OSError."""
        found = os.listdir(f"{self._folder}/task")
        there = set(found)
        for name in [name for name in self._kept if name.startswith("task/") and name.split("/", 2)[1] not in there]:
            os.close(self._kept.pop(name))
        return found

    def close(self) -> None:
        """Closes all descriptors."""
        while self._kept:
            os.close(self._kept.popitem()[1])
