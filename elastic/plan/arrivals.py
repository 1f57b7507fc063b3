"""Which of its forwards a worker runs next: two kinds of queue, told of every input that arrives.

`put(rank, at_s)` comes in the order in which inputs are known to arrive; `ready_s(free_s)` is when a worker that is free from then on can
start the next forward, infinite as long as that is not known; `pop(free_s)` takes that forward and gives its rank. Ranks are places in the
order of all micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush


class InOrder:
    """Forwards go by rank, and wait for those ranked before them."""

    __slots__ = ("_at", "_done", "_ranks")

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks, self._done = ranks, 0
        self._at: dict[int, float] = {}

    def put(self, rank: int, at_s: float) -> None:
        self._at[rank] = at_s

    def ready_s(self, free_s: float) -> float:
        if self._done == len(self._ranks):
            return math.inf
        at_s = self._at.get(self._ranks[self._done], math.inf)
        return at_s if at_s > free_s else free_s

    def pop(self, free_s: float) -> int:
        self._done += 1
        return self._ranks[self._done - 1]


class AsTheyArrive:
    """Whichever can start first; by rank among those that have arrived."""

    __slots__ = ("_arrived", "_coming")

    def __init__(self) -> None:
        self._arrived: list[int] = []
        self._coming: list[tuple[float, int]] = []

    def put(self, rank: int, at_s: float) -> None:
        heappush(self._coming, (at_s, rank))

    def ready_s(self, free_s: float) -> float:
        while self._coming and self._coming[0][0] <= free_s:
            heappush(self._arrived, heappop(self._coming)[1])
        if self._arrived:
            return free_s
        return self._coming[0][0] if self._coming else math.inf

    def pop(self, free_s: float) -> int:
        self.ready_s(free_s)
        return heappop(self._arrived) if self._arrived else heappop(self._coming)[1]
