"""Checks the limits of this machine that any job needs, and describes the first that is too small."""

from __future__ import annotations

import os
import resource
import tempfile
from dataclasses import dataclass

from elastic.errors import SettingsError
from elastic.host.limits import in_mb, process_limit

# Measured with torch 2.13: with 1,125 MB two workers cannot map each other's segments, with 1,180 MB a small model trains; with 44
# descriptors two workers train, and six with 68. With torch 2.7 and 2 to 8 workers the agent had 17 to 24 descriptors, and three or four
# for each worker. The run directory has a few small files, without those of etcd.
MEMORY_BYTES = 1_250_000_000
FILES, FILES_PER_WORKER = 32, 6
DISK_BYTES = 1_000_000
DISK_FILES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """The limits of each process of a job; None is no limit. `disk_bytes` and `disk_files` are free in `directory`."""

    memory_bytes: int | None = None
    files: int | None = None
    disk_bytes: int | None = None
    disk_files: int | None = None
    directory: str = ""

    @classmethod
    def here(cls, directory: str) -> JobLimits:
        """Reads the limits; for files the hard limit, to which the job's processes raise the soft one."""
        disk = os.statvfs(directory)
        return cls(
            memory_bytes=process_limit(resource.RLIMIT_AS),
            files=process_limit(resource.RLIMIT_NOFILE, hard=True),
            disk_bytes=disk.f_bavail * disk.f_frsize,
            disk_files=disk.f_favail if disk.f_files else None,  # some file systems do not count them
            directory=directory,
        )

    def too_small(self, workers: int) -> str | None:
        """Returns a sentence about the first limit that is too small for so many workers, and what to do; None if none is."""
        files = FILES + FILES_PER_WORKER * workers
        if self.memory_bytes is not None and self.memory_bytes < MEMORY_BYTES:
            needed, have = in_mb(MEMORY_BYTES), in_mb(self.memory_bytes)
            return f"each process of a job needs {needed} of address space before it has a model, and may have {have}: raise `ulimit -v`"
        if self.files is not None and self.files < files:
            return f"a job with {workers} workers needs {files} open files, and a process may have {self.files}: raise `ulimit -n`"
        if self.disk_bytes is not None and self.disk_bytes < DISK_BYTES:
            return self._no_room(in_mb(DISK_BYTES), in_mb(self.disk_bytes))
        if self.disk_files is not None and self.disk_files < DISK_FILES:
            return self._no_room(f"room for {DISK_FILES} files", f"room for {self.disk_files}")
        return None

    def _no_room(self, needed: str, have: str) -> str:
        place = f"{self.directory} has {have} free"
        return f"a job needs {needed} on disk, and {place}: free some, or choose another place with TMPDIR or directory="


def check(workers: int, directory: str | None) -> None:
    """Raises SettingsError if a job with its run directory there, by default in the temporary directory, cannot run within the limits."""
    try:
        place = tempfile.gettempdir() if directory is None else directory
    except FileNotFoundError as error:  # gettempdir tries to write to each candidate
        raise SettingsError(f"no temporary directory can be written to: set TMPDIR to one that can, or use directory= ({error})") from error
    while not os.path.isdir(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    too_small = JobLimits.here(place).too_small(workers)
    if too_small is not None:
        raise SettingsError(too_small)
