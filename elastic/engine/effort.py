"""What a worker's layers took, by the clock, of processor time, and by the workload; and how fast its processor is without them.

The workload may be wrong about layers. Of a worker that nobody shares its layers with, two things can be said all the same: how long it
had to wait for its processor while it computed, and how long that takes for a computation which is the same for all workers.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from elastic.memory.tensors import empty

_SIDE = 128
_TURNS = 4


class EffortReport(NamedTuple):
    """Seconds in the layers since the view began: by the clock, of the processor, by the workload. And those of the speed reference."""

    computed_s: float
    cpu_s: float
    expected_s: float
    reference_s: float


class Effort:
    """A context in which layers compute; waiting for others is outside of it. `expected_s` is for the caller to add to."""

    def __init__(self) -> None:
        self.computed_s = self.cpu_s = self.expected_s = 0.0
        self._began_s = self._began_cpu_s = 0.0

    def __enter__(self) -> None:
        self._began_s, self._began_cpu_s = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.thread_time() - self._began_cpu_s
        self.computed_s += time.perf_counter() - self._began_s

    def told(self, reference: SpeedReference) -> EffortReport:
        """As it stands, with a fresh measurement of the speed reference."""
        return EffortReport(self.computed_s, self.cpu_s, self.expected_s, reference.measure())


class SpeedReference:
    """A product of two small matrices, 0.04 ms on one core of today: it has no part in the training, and draws no random numbers."""

    def __init__(self) -> None:
        self._factor = torch.linspace(-1.0, 1.0, _SIDE * _SIDE).reshape(_SIDE, _SIDE)
        self._product = empty((_SIDE, _SIDE), self._factor.dtype)

    def measure(self) -> float:
        """Its seconds of processor time, the least of a few."""
        return min(self._once() for _ in range(_TURNS))

    def _once(self) -> float:
        began = time.thread_time()
        torch.mm(self._factor, self._factor, out=self._product)
        return time.thread_time() - began
