"""Wall-clock, CPU and predicted seconds of a worker's layers, and the speed of its processor on a fixed computation.

The workload's predictions may be wrong. Two ratios do not depend on them, so they serve for a worker whose layers no other worker has:
wall-clock over CPU time of its layers (waiting for the processor), and the CPU time of a computation that is the same on all workers.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from elastic.memory import device
from elastic.memory.tensors import empty

_SIDE = 128
_TURNS = 4


class EffortReport(NamedTuple):
    """Seconds in the layers since the view began (wall-clock, CPU, as the workload predicts), and CPU seconds of the speed reference."""

    computed_s: float
    cpu_s: float
    expected_s: float
    reference_s: float


class Effort:
    """Context manager that times the computation of layers, without waiting for peers. The caller adds to `expected_s`."""

    def __init__(self) -> None:
        self.computed_s = self.cpu_s = self.expected_s = 0.0
        self._began_s = self._began_cpu_s = 0.0
        self._timer = None if device.on_host() else device.Timer()

    def __enter__(self) -> None:
        if self._timer is not None:
            self._timer.begin()
        else:
            self._began_s, self._began_cpu_s = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.end()
            return
        self.cpu_s += time.thread_time() - self._began_cpu_s
        self.computed_s += time.perf_counter() - self._began_s

    def of(self, counts: bool) -> AbstractContextManager[None]:
        """Returns this, or a context manager that times nothing."""
        return self if counts else nullcontext()

    def told(self, reference: SpeedReference) -> EffortReport:
        """Returns the sums so far, with a fresh measurement of the speed reference. A device's layers never wait for a processor."""
        if self._timer is not None:
            self.computed_s = self.cpu_s = self._timer.seconds()
        return EffortReport(self.computed_s, self.cpu_s, self.expected_s, reference.measure())


class SpeedReference:
    """A product of two small matrices, 0.04 ms on one current core. It does not affect the training, and draws no random numbers.

    On a device it is timed on the host, after all that the device was given before: its seconds are mostly those of starting it.
    """

    def __init__(self) -> None:
        self._factor = device.placed(torch.linspace(-1.0, 1.0, _SIDE * _SIDE).reshape(_SIDE, _SIDE))
        self._product = empty((_SIDE, _SIDE), self._factor.dtype)

    def measure(self) -> float:
        """Returns its CPU seconds (on a device: wall-clock seconds), the least of a few runs."""
        return min(self._once() for _ in range(_TURNS))

    def _once(self) -> float:
        clock = time.thread_time if device.on_host() else device.clock
        began = clock()
        torch.mm(self._factor, self._factor, out=self._product)
        return clock() - began
