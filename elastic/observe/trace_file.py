"""What one worker does when, in a file that outlives it: fixed records in memory that the file backs, so a killed worker loses none.

A record is the time (time.monotonic()), a code (of a phase, or of a wait's begin or end), the epoch, the step, and the micro-batch or the
worker that is waited for. Rare things (`mark`) are lines of JSON in a file besides.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from elastic.observe.activity import PHASES
from elastic.observe.json_lines import append_lines

RECORD = struct.Struct("=dHHii")
WAITS, ENDS_WAITING = 100, 101
_CODES = {phase: code for code, phase in enumerate(PHASES)}
_CHUNK = RECORD.size << 14
MOST = RECORD.size << 21
"""The largest size of a file: two million records. What follows is not recorded."""

_NONE = -1


class TraceFile:
    """The trace of one worker, written by its training thread. A file that cannot be written ends the recording, and nothing else."""

    def __init__(self, folder: Path, worker: int) -> None:
        self._marks = folder / f"{worker}.jsonl"
        self._memory: mmap.mmap | None = None
        self._descriptor, self._at, self._size = -1, 0, 0
        with suppress(OSError):
            folder.mkdir(0o700, exist_ok=True)
            self._descriptor = os.open(folder / str(worker), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def phase(self, phase: str, step: int, epoch: int, micro_batch: int = _NONE) -> None:
        """Records that a phase begins now."""
        self._add(_CODES[phase], epoch, step, micro_batch)

    def waits(self, peer: int | None) -> None:
        """Records that the thread begins to wait for a worker, or has ended waiting."""
        if peer is None:
            self._add(ENDS_WAITING, 0, _NONE, _NONE)
        else:
            self._add(WAITS, 0, _NONE, peer)

    def _add(self, code: int, epoch: int, step: int, number: int) -> None:
        at = self._at
        if at + RECORD.size > self._size and not self._grow():
            return
        RECORD.pack_into(self._memory, at, time.monotonic(), code, epoch & 0xFFFF, step, number)  # type: ignore[arg-type]
        self._at = at + RECORD.size

    def _grow(self) -> bool:
        if self._descriptor < 0 or self._size >= MOST:
            return False
        try:
            size = self._size + _CHUNK
            os.posix_fallocate(self._descriptor, 0, size)  # a full disk is an error here, and not a signal later
            if self._memory is not None:
                self._memory.close()
            self._memory, self._size = mmap.mmap(self._descriptor, size), size
        except OSError:
            self._descriptor = -1
            return False
        return True

    def mark(self, name: str, begin: float, end: float, **more: Any) -> None:
        """Records something rare that took from `begin` to `end` (time.monotonic())."""
        with suppress(OSError):
            append_lines(self._marks, [{"name": name, "begin": begin, "end": end, **more}])


def records(path: Path) -> Iterator[tuple[float, int, int, int, int]]:
    """Yields the records of a file: time, code, epoch, step, micro-batch or worker; also those of a worker that was killed."""
    data = path.read_bytes()
    for found in RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]):
        if found[0] == 0.0:
            return
        yield found
