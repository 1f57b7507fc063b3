"""What each worker is doing now, in shared memory: a file of 64 bytes per worker, which anyone on the host may read at any time.

The file holds two records that are written in turn, each between two copies of its number: the writer stores number, content, number, and
a reader loads them in the reverse order, so that equal numbers mean a whole record. A worker that dies within a write leaves the record
before it. Processors that reorder stores would need barriers, which Python lacks; even there two writes would have to overtake a reader.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STEP_PHASES = ("forward", "backward", "reduce", "ready", "apply", "gather", "replicate")
RECOVERY_PHASES = ("quiesce", "propose", "migrate", "gate", "commit")
PHASES = ("idle", *STEP_PHASES, *RECOVERY_PHASES)

_SIZE = 64
_RECORD = struct.Struct("@HBxiIidH")  # number, phase, step, epoch, micro-batch, at, number
_NUMBER = struct.Struct("@H")
_PID = struct.Struct("@I")
_SECOND = 32  # offset of the second record, for odd numbers
_LAST = _RECORD.size - _NUMBER.size
_PID_AT = _SECOND - _PID.size
_NUMBERS = 65534  # numbers run from 1 to this even number, so that odd and even alternate across the wrap; 0 means never written
_TRIES = 30  # a record that is not whole after so many tries was left by a death

_CODES = {phase: code for code, phase in enumerate(PHASES)}
_pack, _now = _RECORD.pack_into, time.monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """A worker's activity: `phase` began in `step` at `at` (time.monotonic()), in `micro_batch` unless that is -1."""

    worker: int
    pid: int
    phase: str
    step: int
    epoch: int
    at: float
    micro_batch: int = -1


class Activity:
    """The activity record of this process, `worker`; for one thread. It begins as `idle` in step -1, and outlives `close` and the process.

    If its file cannot be made (no space, or the directory is gone), the record cannot be read, and nothing else changes.
    """

    def __init__(self, directory: Path | str, worker: int) -> None:
        path = _path(directory, worker)
        new = path.with_name(f"{worker}.new")
        self._memory = _shared(new)
        _PID.pack_into(self._memory, _PID_AT, os.getpid())
        self._number = 0
        for _ in range(2):  # both records
            self.enter("idle", -1, 0)
        with suppress(OSError):
            new.rename(path)  # a file that can be opened always has a record

    def enter(self, phase: str, step: int, epoch: int, micro_batch: int = -1) -> None:
        """Records that `phase`, one of PHASES (else KeyError), begins now."""
        self._number = number = self._number % _NUMBERS + 1
        _pack(self._memory, (number & 1) << 5, number, _CODES[phase], step, epoch, micro_batch, _now(), number)

    def close(self) -> None:
        """Unmaps the memory; the last record can still be read from the file."""
        self._memory.close()


class ActivityReader:
    """Reads the activity of one worker repeatedly. Raises FileNotFoundError if it has none (yet)."""

    def __init__(self, directory: Path | str, worker: int) -> None:
        self._worker = worker
        with _path(directory, worker).open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ)

    def read(self) -> Doing | None:
        """Returns the last record, None if none is whole."""
        record = None
        for attempt in range(_TRIES):
            if attempt % 2:  # the order alternates: a writer in step with this loop would otherwise spoil every try
                odd, even = self._record(_SECOND), self._record(0)
            else:
                even, odd = self._record(0), self._record(_SECOND)
            record = even or odd or record
            if even is not None and odd is not None:
                record = odd if (odd[0] - even[0]) % _NUMBERS < _NUMBERS // 2 else even
                break
        if record is None:
            return None
        _, code, step, epoch, micro_batch, at, _ = record
        (pid,) = _PID.unpack_from(self._memory, _PID_AT)
        return Doing(worker=self._worker, pid=pid, phase=PHASES[code], step=step, epoch=epoch, at=at, micro_batch=micro_batch)

    def _record(self, place: int) -> tuple[int, int, int, int, int, float, int] | None:
        memory = self._memory
        (last,) = _NUMBER.unpack_from(memory, place + _LAST)
        record = _RECORD.unpack_from(memory, place)
        (first,) = _NUMBER.unpack_from(memory, place)
        return record if first == last != 0 else None

    def close(self) -> None:
        """Unmaps the memory."""
        self._memory.close()


def read(directory: Path | str, worker: int) -> Doing | None:
    """Returns what `worker` of the job with this directory is doing, or did last; None without a record."""
    with suppress(OSError, ValueError, IndexError):  # the file cannot be read, is cut short, or is something else
        watch = ActivityReader(directory, worker)
        try:
            return watch.read()
        finally:
            watch.close()
    return None


def _shared(new: Path) -> mmap.mmap:
    """Returns the memory of a new file, or anonymous memory if the file cannot be made."""
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        found = new.parent.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "not a directory of this user", str(new.parent))
        new.unlink(missing_ok=True)
        with new.open("x+b") as file:  # never through a symbolic link
            file.write(bytes(_SIZE))
            file.flush()
            return mmap.mmap(file.fileno(), _SIZE)
    except OSError:
        return mmap.mmap(-1, _SIZE)


def _path(directory: Path | str, worker: int) -> Path:
    return Path(directory) / "activity" / str(worker)
