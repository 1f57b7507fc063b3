"""What each worker is doing now, in shared memory: a small file per worker, which anyone on the host may read at any time.

The file begins with two records that are written in turn, each between two copies of its number: the writer stores number, content,
number, and a reader loads them in the reverse order, so that equal numbers mean a whole record. A worker that dies within a write leaves
the record before it. Processors that reorder stores would need barriers, which Python lacks; even there two writes would have to overtake
a reader.

Behind them lies the worker's *standing*: whose code its training thread is in, which worker it waits for, and how long each phase took at
most in recent steps. These fields are written one by one: a reader may see a mixture, which the next read corrects.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STEP_PHASES = ("forward", "backward", "reduce", "ready", "apply", "gather", "replicate")
RECOVERY_PHASES = ("quiesce", "propose", "migrate", "gate", "commit")
PHASES = ("idle", *STEP_PHASES, *RECOVERY_PHASES)

TRAIN_FN = "train_fn"
"""The place of user code outside steps: before the loop, in loop bodies, after the loop. A collective that it calls belongs to it."""

LOADER = "data loader"
"""The place of user code that loads a micro-batch, within a step."""

CHECKPOINT = "checkpoint"
"""The place of code that waits for the storage of checkpoints."""

PLACES = ("runtime", TRAIN_FN, LOADER, CHECKPOINT)
"""Whose code a training thread is in."""

AGENT = -2
"""The value of `Standing.waits_for` of a worker that waits for its agent's orders."""

NOBODY = -1

_SIZE = 256
_RECORD = struct.Struct("@HBxiIidH")  # number, phase, step, epoch, micro-batch, at, number
_NUMBER = struct.Struct("@H")
_PID = struct.Struct("@I")
_SECOND = 32  # offset of the second record, for odd numbers
_LAST = _RECORD.size - _NUMBER.size
_PID_AT = _SECOND - _PID.size
_NUMBERS = 65534  # numbers run from 1 to this even number, so that odd and even alternate across the wrap; 0 means never written
_WAIT, _PLACE = struct.Struct("@id"), struct.Struct("@id")
_WAIT_AT, _PLACE_AT, _FIRST_AT, _LONGEST_AT, _PULSE_AT = 64, 80, 96, 104, 248
_FIRST = struct.Struct("@i")  # the first step of the epoch
_UNBEGUN = (1 << 31) - 1  # no step of the epoch has begun
_LONGEST = _PULSE = struct.Struct("@d")
_WINDOW = 8  # steps; the longest phases are those of the last one or two windows
_LOADER_ROW = len(PHASES)  # the row of the data loader, behind those of the phases
_ROWS = _LOADER_ROW + 1
_LOADING = PLACES.index(LOADER)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Whose code a worker's training thread is in, and for whom it waits.

    `place` (of PLACES) since `place_at`; `waits_for` another worker, or AGENT, since `waits_at`; NOBODY if it does not wait. `longest_s` is
    the most seconds that its present phase (or the data loader) took in one of the last steps, waiting not counted; 0.0 if unknown.
    `first`: the step is the first one of its epoch in this process. Times are those of time.monotonic().
    """

    place: str = PLACES[0]
    place_at: float = 0.0
    waits_for: int = NOBODY
    waits_at: float = 0.0
    longest_s: float = 0.0
    first: bool = False


class Activity:
    """The activity record of this process, `worker`; for one thread. It begins as `idle` in step -1, and outlives `close` and the process.

    If its file cannot be made (no space, or the directory is gone), the record cannot be read, and nothing else changes.
    """

    def __init__(self, directory: Path | str, worker: int) -> None:
        path = _path(directory, worker)
        new = path.with_name(f"{worker}.new")
        self._memory = _shared(new)
        self._waiting_since = 0.0
        _PID.pack_into(self._memory, _PID_AT, os.getpid())
        self._number = 0
        self._thread = threading.get_ident()
        self._code, self._began, self._away = 0, _now(), 0.0  # the present phase, and the seconds of it that were not spent in it
        self._step, self._epoch, self._first = -1, -1, _UNBEGUN
        self._window, self._windows = 0, ([0.0] * _ROWS, [0.0] * _ROWS)
        self._place, self._place_began = 0, 0.0
        self.waits(None)
        self.at(TRAIN_FN)
        for _ in range(2):  # both records
            self.enter("idle", -1, 0)
        with suppress(OSError):
            new.rename(path)  # a file that can be opened always has a record

    def enter(self, phase: str, step: int, epoch: int, micro_batch: int = -1) -> None:
        """Records that `phase`, one of PHASES (else KeyError), begins now."""
        code, now = _CODES[phase], _now()
        self._took(self._code, now - self._began - self._away)
        if step != self._step or epoch != self._epoch:
            self._begin(step, epoch)
        if self._first == _UNBEGUN and phase == STEP_PHASES[0]:
            self._first = step
            _FIRST.pack_into(self._memory, _FIRST_AT, step)
        self._code, self._began, self._away = code, now, 0.0
        self._number = number = self._number % _NUMBERS + 1
        _pack(self._memory, (number & 1) << 5, number, code, step, epoch, micro_batch, now, number)

    def waits(self, peer: int | None) -> None:
        """Records that the training thread begins to wait for a worker (or AGENT), or has ended waiting. Other threads do not count."""
        if threading.get_ident() != self._thread:
            return
        now = _now()
        if peer is None and self._waiting_since:
            self._away += now - self._waiting_since
        self._waiting_since = 0.0 if peer is None else now
        _WAIT.pack_into(self._memory, _WAIT_AT, NOBODY if peer is None else peer, now)

    def pulse(self) -> None:
        """Records that Python code runs in this process; any thread may call it."""
        _PULSE.pack_into(self._memory, _PULSE_AT, _now())

    def at(self, place: str) -> str:
        """Records that the training thread's code is now that of `place`, one of PLACES, and returns the place before."""
        before, now = self._place, _now()
        if before == _LOADING:
            self._took(_LOADER_ROW, now - self._place_began)
        if before:
            self._away += now - self._place_began
        self._place, self._place_began = PLACES.index(place), now
        _PLACE.pack_into(self._memory, _PLACE_AT, self._place, now)
        return PLACES[before]

    def _took(self, row: int, seconds: float) -> None:
        new, old = self._windows
        if seconds > new[row]:
            new[row] = seconds
            if seconds > old[row]:
                _LONGEST.pack_into(self._memory, _LONGEST_AT + _LONGEST.size * row, seconds)

    def _begin(self, step: int, epoch: int) -> None:
        """Begins another window every few steps. So the first steps of an epoch, which take longer, are soon forgotten."""
        if epoch != self._epoch:
            self._first = _UNBEGUN
            _FIRST.pack_into(self._memory, _FIRST_AT, self._first)
        if step > 0 and step // _WINDOW != self._window:
            self._window = step // _WINDOW
            self._windows = ([0.0] * _ROWS, self._windows[0])
            for row, seconds in enumerate(self._windows[1]):
                _LONGEST.pack_into(self._memory, _LONGEST_AT + _LONGEST.size * row, seconds)
        self._step, self._epoch = step, epoch

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
        return Doing(worker=self._worker, pid=self.pid, phase=PHASES[code], step=step, epoch=epoch, at=at, micro_batch=micro_batch)

    @property
    def pid(self) -> int:
        """The process that has the record."""
        return _PID.unpack_from(self._memory, _PID_AT)[0]

    @property
    def pulse_at(self) -> float:
        """When Python code last ran in that process, as far as its threads tell; 0.0 if they do not tell yet."""
        return _PULSE.unpack_from(self._memory, _PULSE_AT)[0]

    def standing(self, doing: Doing | None) -> Standing:
        """Returns the worker's standing in what it is `doing`."""
        peer, waits_at = _WAIT.unpack_from(self._memory, _WAIT_AT)
        place, place_at = _PLACE.unpack_from(self._memory, _PLACE_AT)
        (first,) = _FIRST.unpack_from(self._memory, _FIRST_AT)
        row = _LOADER_ROW if place == _LOADING or doing is None else _CODES[doing.phase]
        (longest,) = _LONGEST.unpack_from(self._memory, _LONGEST_AT + _LONGEST.size * row)
        return Standing(
            place=PLACES[place],
            place_at=place_at,
            waits_for=peer,
            waits_at=waits_at,
            longest_s=longest,
            first=doing is None or doing.step <= first,
        )

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
