"""Times a search."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def timed(work: Callable[[], T], repeat: int) -> tuple[T, float]:
    """Returns the result, and the median wall-clock seconds of `repeat` runs of the same work."""
    taken: list[float] = []
    while True:
        start = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - start)
        if len(taken) >= repeat:
            return result, statistics.median(taken)
