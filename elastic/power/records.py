"""What is recorded of the clocks that the runtime has locked: one file for each GPU, in a directory that all jobs of the host share.

A GPU belongs to the process that holds the file lock of its record; the kernel releases that lock when the process ends, however it ends. A
record is written, and synced, before the clock is locked, and removed after the lock is removed. So what lies there without an owner is
what a killed process has left: its successor removes the lock of the clock. After a reboot the driver has no locks any more, and the clock
may be somebody else's by then: such a record is only removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from elastic.power.conditions import Condition, power_error

_UUID = re.compile(r"GPU-[0-9A-Za-z-]{1,80}")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Returns the kernel's id of this boot, empty if it has none."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockRecord:
    """A GPU whose clock the runtime has locked, or is about to: in which boot, by which process, for which job, to which clock."""

    uuid: str
    boot: str
    pid: int
    job: str
    mhz: int


class Records:
    """The directory of records. Raises PowerError if it cannot be made, or other users may write in it."""

    def __init__(self, directory: Path, boot: str | None = None) -> None:
        self._directory, self.boot = directory, boot_id() if boot is None else boot
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.lstat()
        except OSError as error:
            raise power_error(Condition.NO_RECORD, f"records of clocks cannot be kept in {directory}", str(error.strerror)) from error
        if not stat.S_ISDIR(status.st_mode):  # a link may be another user's, who may let it lead elsewhere at any time
            raise power_error(Condition.NO_RECORD, f"records of clocks cannot be kept in {directory}, which is no directory")
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise power_error(Condition.NO_RECORD, f"records of clocks cannot be kept in {directory}, where other users may write")

    def uuids(self) -> list[str]:
        """Returns the GPUs that have a record, also a damaged one."""
        return sorted(path.stem for path in self._directory.glob("GPU-*.json") if _UUID.fullmatch(path.stem))

    def own(self, uuid: str) -> Owned:
        """Takes ownership of a GPU. Raises PowerError (shared GPU) if another process has it."""
        if not _UUID.fullmatch(uuid):
            raise power_error(Condition.NO_GPU, f"{uuid!r} is no UUID of a GPU")
        try:
            descriptor = os.open(self._directory / f"{uuid}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            what = f"the clock of GPU {uuid} cannot be recorded in {self._directory}"
            raise power_error(Condition.NO_RECORD, what, str(error.strerror)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise power_error(Condition.SHARED, f"the clock of GPU {uuid} is in the hands of {holder}") from error
        return Owned(self._directory / f"{uuid}.json", uuid, descriptor, self.boot)


class Owned:
    """A GPU that this process owns until `release`, or its end."""

    def __init__(self, path: Path, uuid: str, descriptor: int, boot: str) -> None:
        self._path, self.uuid, self._descriptor, self._boot = path, uuid, descriptor, boot

    def describe(self, holder: str) -> None:
        """Names the owner for others that ask for this GPU."""
        with suppress(OSError):  # a full disk: `record` says so before a clock is changed
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, holder.encode(), 0)

    @property
    def left(self) -> bool:
        """Whether a lock of this boot was left: its record names this boot, or cannot be read. A record of another boot is removed."""
        try:
            mode = self._path.lstat().st_mode
            text = self._path.read_text() if stat.S_ISREG(mode) else ""
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError):
            return True
        if stat.S_ISDIR(mode):
            return False  # the runtime makes none, and cannot remove it either
        with suppress(ValueError, TypeError, RecursionError):
            record = ClockRecord(**json.loads(text))
            if isinstance(record.boot, str) and record.boot and self._boot and record.boot != self._boot:
                self.forget()
                return False
        return True

    def record(self, job: str, mhz: int) -> None:
        """Writes the record of a lock that is about to be set. Raises PowerError if it cannot be written: then no lock must be set."""
        record = ClockRecord(uuid=self.uuid, boot=self._boot, pid=os.getpid(), job=job, mhz=mhz)
        fields = {name: getattr(record, name) for name in ClockRecord.__slots__}
        new = self._path.with_suffix(".new")
        try:
            with new.open("w") as file:
                json.dump(fields, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            what = f"the clock of GPU {self.uuid} is not changed, since no record of it can be written to {self._path}"
            raise power_error(Condition.NO_RECORD, what, str(error.strerror)) from error

    def forget(self) -> None:
        """Removes the record: no lock is set."""
        with suppress(OSError):  # what remains is restored once more than needed
            self._path.unlink()

    def release(self) -> None:
        """Gives the GPU back. Its lock file remains: removing it could give two processes each a lock of their own."""
        os.close(self._descriptor)
