"""The revision of an etcd's data, which only grows: one that goes back shows that etcd has older data than before, or none."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Revisions:
    """The newest revision that is known. Any thread may call."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.newest = 0
        self._clock = clock
        self._went_back_at = -math.inf

    def answered(self, revision: int, known: int) -> None:
        """Notes the revision of an answer to a request that was sent when `known` was the newest: a later answer may come first."""
        if revision < known:
            self._went_back_at, self.newest = self._clock(), revision
        else:
            self.newest = max(self.newest, revision)

    def went_back(self, seconds: float) -> bool:
        """Whether it has gone back in the last `seconds`."""
        return self._clock() - self._went_back_at < seconds
