"""Says what happens again and again now and then, with how often it did."""

from __future__ import annotations

import time

_EVERY_S = 10.0


class Rarely:
    """Lets the first of many like sentences through, and then one in so many seconds."""

    def __init__(self, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._said_at = float("-inf")
        self._silent = 0

    def due(self, now: float | None = None) -> int | None:
        """How many sentences were left out since the last one, if this one is to be said; None if it is left out too."""
        moment = time.monotonic() if now is None else now
        if moment - self._said_at < self._every_s:
            self._silent += 1
            return None
        silent, self._silent, self._said_at = self._silent, 0, moment
        return silent
