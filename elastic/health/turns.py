"""Who is stopped in turns, as by a program that limits processor time with signals, or by a control group that is frozen again and again.

Such a worker is never stopped for long. It may even compute its layers in normal time, between two stops, and is late with everything else.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence

from elastic.health.evidence import Observed

LOOKS = 25
"""Looks that count: 5 s."""

SHARE = 0.5
"""The least share of them in which a worker was stopped."""


class Turns:
    """The last looks at the members of one view."""

    def __init__(self) -> None:
        self._epoch = 0
        self._stopped: deque[frozenset[int]] = deque(maxlen=LOOKS)

    def note(self, epoch: int, members: Collection[int], seen: Sequence[Observed]) -> None:
        """Records who is stopped; nobody, if all are."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._stopped.clear()
        stopped = frozenset(each.worker for each in seen if each.stopped and each.worker in members)
        self._stopped.append(stopped if len(stopped) < len(members) else frozenset())

    def worst(self, epoch: int) -> tuple[int, float] | None:
        """Returns the worker that was stopped most often, and in which share of the looks; None if there is no such worker."""
        if epoch != self._epoch or len(self._stopped) < LOOKS:
            return None
        times = Counter(worker for stopped in self._stopped for worker in stopped)
        worker, most = max(times.items(), key=lambda each: (each[1], -each[0]), default=(None, 0))
        return None if worker is None or most < SHARE * LOOKS else (worker, most / LOOKS)
