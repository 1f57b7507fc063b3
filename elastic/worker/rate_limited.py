"""Limits the rate of a repeated message, and counts the ones left out."""

from __future__ import annotations

import time

_EVERY_S = 10.0


class Rarely:
    """Lets the first of many similar messages through, and then one in `every_s` seconds."""

    def __init__(self, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._said_at = float("-inf")
        self._silent = 0

    def due(self, now: float | None = None) -> int | None:
        """Returns the number of messages left out since the last one, if this one is due; None if it is left out too."""
        moment = time.monotonic() if now is None else now
        if moment - self._said_at < self._every_s:
            self._silent += 1
            return None
        silent, self._silent, self._said_at = self._silent, 0, moment
        return silent
