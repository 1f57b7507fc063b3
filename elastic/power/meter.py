"""Joules of a GPU from its energy counter, or from power readings where it has none. Pure: readings and times go in.

Counters wrap, and begin again when the driver is loaded; sensors may freeze or read negative values. Then the meter has no value, which is
better than a wrong one: `fault` names the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

WRAPS = (1 << 32, 1 << 64)
"""Sizes of counters, in millijoules. One that falls from the last quarter of its range to the first has wrapped."""

FROZEN_S = 3.0
"""A sensor whose value has not changed for so long, to the last digit, while the GPU computed, is frozen. Measuring a GPU at four clocks
takes 4 s at least (`windows.SECONDS`), so it is known before clocks are chosen."""

MOST_W = 5000.0
"""No GPU takes so many watts: more is a wrong reading, or a counter that began again."""


def advanced_mj(before: int, now: int) -> int | None:
    """Returns by how much an energy counter has advanced, in millijoules; None if it began again."""
    if now >= before:
        return now - before
    for size in WRAPS:
        if size * 3 // 4 <= before < size and now < size // 4:
            return now + size - before
    return None


@dataclass(slots=True)
class Meter:
    """The joules of one GPU since the first reading."""

    joules: float = 0.0
    seconds: float = 0.0
    restarts: int = 0
    fault: str | None = None
    _counter: int | None = None
    _power_w: float | None = None
    _at: float | None = None
    _changed_at: float = field(default=0.0)

    def counter(self, millijoules: int, at: float, *, busy: bool = True) -> None:
        """Takes a reading of the energy counter at a monotonic time in seconds. `busy`: the GPU computed since the last one."""
        before, since = self._counter, self._at
        self._counter, self._at = millijoules, at
        if before is None or since is None:
            self._changed_at = at
            return
        moved = advanced_mj(before, millijoules)
        if moved is None or moved / 1000 > MOST_W * max(at - since, 1e-3):
            self.restarts += 1  # what was used in between is not known: neither joules nor seconds count
            self._changed_at = at
            return
        if moved or not busy:
            self._changed_at = at
        self._judge(at, "its energy counter stands still")
        self.joules += moved / 1000
        self.seconds += at - since

    def power(self, watts: float, at: float, *, busy: bool = True) -> None:
        """Takes a reading of the power, for a GPU without an energy counter; it counts from the reading before."""
        if not (math.isfinite(watts) and 0 <= watts <= MOST_W):
            self.fault = f"its power sensor reads {watts:.4g} W"
            self._power_w = self._at = None
            return
        before, since = self._power_w, self._at
        self._power_w, self._at = watts, at
        if before is None or since is None:
            self._changed_at = at
            return
        if watts != before or not busy:
            self._changed_at = at
        self._judge(at, f"its power sensor has read {watts:.4g} W all the time")
        self.joules += (watts + before) / 2 * (at - since)
        self.seconds += at - since

    def _judge(self, at: float, what: str) -> None:
        self.fault = f"{what}, for {at - self._changed_at:.0f} s" if at - self._changed_at > FROZEN_S else None

    @property
    def watts(self) -> float | None:
        """The mean power; None if there is none, or it is not to be believed."""
        return self.joules / self.seconds if self.seconds > 0 and self.fault is None else None
