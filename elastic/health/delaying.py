"""Who keeps most others waiting, look by look.

A worker that a processor quota or signals stop in turns may compute its layers in normal time, between two stops, and be late with
everything else. So it is recognised by the others, which wait for it nearly always.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import replace

from elastic.health.evidence import Observed
from elastic.health.waiting import awaited
from elastic.observe.activity import LOADER, NOBODY

LOOKS = 40
"""Looks that count: 8 s."""

SHARE = 0.8
"""The least share of them in which one worker kept most others waiting."""


class Delays:
    """The last looks at the members of one view."""

    def __init__(self) -> None:
        self._epoch = 0
        self._roots: deque[int | None] = deque(maxlen=LOOKS)

    def note(self, epoch: int, members: Collection[int], seen: Sequence[Observed]) -> None:
        """Records whom at least half of the other members waited for; nobody, if that is one that runs the user's own code."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._roots.clear()
        waiting = awaited([_active(each) for each in seen if each.worker in members])
        root = max(waiting, key=lambda worker: len(waiting[worker]), default=None)
        blamed = {each.worker for each in seen if each.stopped or not (each.outside or (each.standing and each.standing.place == LOADER))}
        enough = root is not None and 2 * len(waiting[root]) >= len(members) - 1
        self._roots.append(root if enough and root in blamed else None)

    def worst(self, epoch: int) -> tuple[int, float] | None:
        """Returns the worker that most others waited for most of the time, and its share of the looks; None if there is no such worker."""
        if epoch != self._epoch or len(self._roots) < LOOKS:
            return None
        worker, times = Counter(self._roots).most_common(1)[0]
        return None if worker is None or times < SHARE * LOOKS else (worker, times / LOOKS)


def _active(seen: Observed) -> Observed:
    """A worker that is runnable does not wait: what it waited for has come, and it has not run since."""
    runnable = seen.state == "R" and seen.standing is not None
    return replace(seen, standing=replace(seen.standing, waits_for=NOBODY)) if runnable and seen.standing is not None else seen
