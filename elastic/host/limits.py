"""Checks the limits of this machine that the private etcd needs, and describes the first that is too small."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

# Measured with etcd 3.5.1: 150 descriptors are too few, it maps 860 MB, and its log is a file of 64 MB that it zeroes at its start.
FILES = 160
MEMORY_BYTES = 1_000_000_000
FILE_BYTES = 64_000_000
DISK_BYTES = 66_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemLimits:
    """The limits of a process started here; None is no limit. `disk_bytes` are free in `directory`."""

    files: int | None = None
    memory_bytes: int | None = None
    file_bytes: int | None = None
    disk_bytes: int | None = None
    directory: str = ""

    @classmethod
    def of_this_process(cls, directory: Path) -> SystemLimits:
        """Reads the limits; for files the hard limit, with which the private etcd is started."""
        disk = os.statvfs(directory)
        return cls(
            files=process_limit(resource.RLIMIT_NOFILE, hard=True),
            memory_bytes=process_limit(resource.RLIMIT_AS),
            file_bytes=process_limit(resource.RLIMIT_FSIZE),
            disk_bytes=disk.f_bavail * disk.f_frsize,
            directory=str(directory),
        )

    def too_small(self) -> str | None:
        """Returns a sentence about the first limit that is too small for a private etcd, and what to do; None if none is."""
        if self.files is not None and self.files < FILES:
            return _sentence(f"{FILES} open files", f"this process may have {self.files}", "raise `ulimit -n`")
        if self.memory_bytes is not None and self.memory_bytes < MEMORY_BYTES:
            have = f"a process may have {in_mb(self.memory_bytes)}"
            return _sentence(f"{in_mb(MEMORY_BYTES)} of address space", have, "raise `ulimit -v`")
        if self.file_bytes is not None and self.file_bytes < FILE_BYTES:
            return _sentence(f"files of {in_mb(FILE_BYTES)}", f"a file may have {in_mb(self.file_bytes)}", "raise `ulimit -f`")
        if self.disk_bytes is not None and self.disk_bytes < DISK_BYTES:
            have = f"{self.directory} has {in_mb(self.disk_bytes)} free"
            return _sentence(f"{in_mb(DISK_BYTES)} of disk", have, "free some, or choose another place with TMPDIR or directory=")
        return None


def process_limit(kind: int, *, hard: bool = False) -> int | None:
    """Returns the soft (or hard) limit of this process for a kind such as `resource.RLIMIT_AS`; None is no limit."""
    value = resource.getrlimit(kind)[1 if hard else 0]
    return None if value == resource.RLIM_INFINITY else value


def _sentence(needed: str, have: str, remedy: str) -> str:
    return f"the private etcd needs {needed}, and {have}: {remedy}, or name a running etcd with etcd='host:port'"


def in_mb(count: int) -> str:
    """Returns a number of bytes as text in MB."""
    return f"{count / 1e6:.0f} MB"
