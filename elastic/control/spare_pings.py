"""Knows which spares cannot join now: those that are stopped, and those that do not answer.

A spare sleeps until its agent sends it something, so what it does shows nothing. It gets a ping now and then, and its activity record shows
that it has read it. An answer is compared with its ping, so a pause of the agent does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from elastic.control.carrier import Carrier
from elastic.control.preparing import Timers

EVERY_S = 5.0
"""Seconds between pings: a spare uses no processor time in between."""

GIVEN_UP = 4
"""After so many pings without an answer a spare is replaced."""

_LATE_S = 1.0  # news of other hosts' workers may be so old


class SparePings:
    """Pings the workers that `spares` returns. Calls `changed` when answers may have changed, `exclude` with a spare that is given up."""

    def __init__(
        self,
        carrier: Carrier,
        timers: Timers,
        spares: Callable[[], Collection[int]],
        changed: Callable[[], None],
        exclude: Callable[[int, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._carrier, self._timers, self._spares, self._changed, self._exclude = carrier, timers, spares, changed, exclude
        self._clock = clock
        self._unanswered: dict[int, int] = {}
        self._pinged: dict[int, float] = {}
        self._timers.set_timer(EVERY_S, self._ping, "pings")

    def close(self) -> None:
        """Ends the pings."""
        self._timers.clear_timer("pings")

    def unable(self) -> frozenset[int]:
        """Returns the spares that are stopped now, or have not answered the last ping."""
        spares = sorted(self._spares())
        stopped = (each.worker for each in (self._carrier.look(spares) if spares else ()) if each.stopped)
        return frozenset({*stopped, *(worker for worker in spares if self._unanswered.get(worker))})

    def _ping(self) -> None:
        now, spares = self._clock(), sorted(self._spares())
        before, pinged = self._unanswered, self._pinged
        self._unanswered, self._pinged = {}, dict.fromkeys(spares, now)
        for seen in self._carrier.look(spares) if spares else ():
            at = pinged.get(seen.worker)
            if at is not None and seen.mute_s > now - at + _LATE_S:
                self._unanswered[seen.worker] = before.get(seen.worker, 0) + 1
        if spares or before:
            self._carrier.tell(spares, {"type": "ping"})
            self._changed()
        for worker, count in self._unanswered.items():
            if count == GIVEN_UP:
                self._exclude(worker, f"a spare, which has not answered for {GIVEN_UP * EVERY_S:.0f} s")
        self._timers.set_timer(EVERY_S, self._ping, "pings")
