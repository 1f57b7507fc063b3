"""Who is stopped in turns: by a program that limits processor time with signals, by a control group that is frozen again and again, or by
the quota of a control group.

Such a worker is never stopped for long. It may even compute its layers in normal time, between two stops, and is late with everything else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from elastic.health.evidence import Observed

LOOKS = 25
"""Looks that count: 5 s."""

SHARE = 0.5
"""The least share of them in which a worker was stopped, or of their time in which its quota was used up."""

ALONE = 2.0
"""How many times as long as some other member it must be kept from running: a quota that all share is no worker's fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Halts:
    """A worker that does not run for this `share` of the time; `by_quota`: most of that is due to the quota of a control group."""

    worker: int
    share: float
    by_quota: bool = False

    @property
    def sentence(self) -> str:
        """What is wrong with the worker."""
        if self.by_quota:
            return f"the processor quota of its control group keeps it from running for {self.share:.0%} of the time"
        return f"it is stopped in turns, in {self.share:.0%} of the last looks"


class Turns:
    """The last looks at the members of one view."""

    def __init__(self) -> None:
        self._epoch = 0
        self._members: Collection[int] = ()
        self._halts: deque[Mapping[int, tuple[float, float]]] = deque(maxlen=LOOKS)  # by worker: stopped, and held by a quota

    def note(self, epoch: int, members: Collection[int], seen: Sequence[Observed]) -> None:
        """Records who is stopped, or kept from running; nobody, if all are stopped."""
        if epoch != self._epoch:
            self._epoch, self._members = epoch, members
            self._halts.clear()
        here = {each.worker: each for each in seen if each.worker in members}
        all_stopped = len(here) == len(members) and all(each.stopped for each in here.values())
        found = {worker: (1.0, 0.0) if each.stopped else (0.0, each.held) for worker, each in here.items() if each.stopped or each.held}
        self._halts.append({} if all_stopped else found)

    def worst(self, epoch: int) -> Halts | None:
        """Returns the worker that ran least, since it was kept from it; None if there is no such worker."""
        if epoch != self._epoch or len(self._halts) < LOOKS:
            return None
        workers = {worker for look in self._halts for worker in look}
        parts = {worker: [sum(look.get(worker, (0.0, 0.0))[kind] for look in self._halts) / LOOKS for kind in (0, 1)] for worker in workers}
        worker = max(parts, key=lambda each: (sum(parts[each]), -each), default=None)
        if worker is None or sum(parts[worker]) < SHARE:
            return None
        stopped, held = parts[worker]
        if held > stopped and held < ALONE * min(parts.get(member, [0.0, 0.0])[1] for member in self._members):
            return None
        return Halts(worker=worker, share=stopped + held, by_quota=held > stopped)
