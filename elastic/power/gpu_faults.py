"""Reads the counters of faults and the Xid events of the GPUs of a job's workers. It runs in the thread of `job_power`, never in a step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pynvml

from elastic.errors import PowerError
from elastic.observe.gpu_health import GpuHealth
from elastic.power.conditions import Condition
from elastic.power.nvml import Gpu, called

_READS: dict[str, Callable[[Gpu], int]] = {
    "ecc_corrected": lambda gpu: gpu.ecc_errors(uncorrected=False),
    "ecc_uncorrected": lambda gpu: gpu.ecc_errors(uncorrected=True),
    "retired_pages": Gpu.retired_pages,
    "remapped_rows": Gpu.remapped_rows,
}
_MOST_EVENTS = 64


def counters(gpu: Gpu) -> dict[str, int]:
    """Returns the counters that the GPU has. Raises PowerError if it does not answer any more."""
    found: dict[str, int] = {}
    for name, read in _READS.items():
        try:
            found[name] = read(gpu)
        except PowerError as error:
            if Condition(error.condition).gone:
                raise
    return found


class XidEvents:
    """The Xid events of GPUs, since each was added. Where the driver does not tell them, `of` returns None."""

    def __init__(self) -> None:
        self._set: Any = None
        self._seen: dict[str, list[int]] = {}

    def add(self, gpu: Gpu) -> None:
        """Watches a GPU, if its driver can."""
        if gpu.uuid in self._seen:
            return
        with suppress(PowerError):  # not supported, or no permission
            if self._set is None:
                self._set = called("Xid events cannot be watched", pynvml.nvmlEventSetCreate)
            gpu.watch_xids(self._set)
            self._seen[gpu.uuid] = []

    def count(self, uuid: str) -> int:
        """Returns how many events of a GPU are known."""
        return len(self._seen.get(uuid, ()))

    def of(self, uuid: str, since: int = 0) -> tuple[int, ...] | None:
        """Returns a GPU's events after the first `since`."""
        self.drain()
        return None if uuid not in self._seen else tuple(self._seen[uuid][since:])

    def drain(self) -> None:
        """Takes what the driver has noted, without waiting."""
        for _ in range(_MOST_EVENTS if self._set is not None else 0):
            try:
                event = called("Xid events cannot be read", pynvml.nvmlEventSetWait_v2, self._set, 0)
                uuid = str(called("a GPU has no UUID", pynvml.nvmlDeviceGetUUID, event.device))
            except PowerError:
                return  # nothing happened, mostly
            self._seen.setdefault(uuid, []).append(int(event.eventData))

    def close(self) -> None:
        """Ends the watch."""
        if self._set is not None:
            with suppress(PowerError):
                called("the watch of Xid events cannot be ended", pynvml.nvmlEventSetFree, self._set)
            self._set = None


@dataclass(slots=True)
class _Watched:
    gpu: Gpu
    before: dict[str, int]
    events: int  # so many had happened before


@dataclass(slots=True)
class GpuFaults:
    """The GPUs of a job's workers. `of` may be called from another thread: it says what is known by then."""

    _xids: XidEvents = field(default_factory=XidEvents)
    _watched: dict[int, _Watched] = field(default_factory=dict)
    _found: dict[int, GpuHealth] = field(default_factory=dict)

    def begin(self, worker: int, gpu: Gpu) -> None:
        """Reads the counters of the GPU that a worker begins to use."""
        self._xids.add(gpu)
        self._xids.drain()
        before: dict[str, int] = {}
        with suppress(PowerError):  # it does not answer: there is nothing to compare with
            before = counters(gpu)
        self._watched[worker] = _Watched(gpu, before, self._xids.count(gpu.uuid))

    def look(self) -> None:
        """Takes the events so far: the driver keeps only some."""
        self._xids.drain()

    def end(self, worker: int) -> None:
        """Reads the counters again after a worker's end."""
        watched = self._watched.pop(worker, None)
        if watched is None:
            return
        after: dict[str, int] = {}
        unreadable = None
        try:
            after = counters(watched.gpu)
        except PowerError as error:
            unreadable = str(error)
        uuid = watched.gpu.uuid
        kept = {"before": watched.before, "after": after, "xids": self._xids.of(uuid, watched.events), "unreadable": unreadable}
        self._found[worker] = GpuHealth(worker=worker, gpu=uuid, **kept)

    def of(self, worker: int) -> GpuHealth | None:
        """Returns what was read of a lost worker's GPU; None if nothing was yet, or it has named none."""
        return self._found.get(worker)

    def close(self) -> None:
        """Ends the watch of events."""
        self._xids.close()
