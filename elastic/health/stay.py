"""How long a worker has been in one and the same moment, and what it used meanwhile. A pure fold over observations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic.health.evidence import Observed, Usage

_IDLE_SHARE = 0.1
"""A training thread that runs or wants to run for less than this share of the time is idle."""

_IDLE_CPU_SHARE = 0.2
"""So are the other threads and descendants of a process that use less than this share of a processor."""

_IDLE_IO_BYTES = 1 << 14
"""So is one that reads or writes less than this between two observations."""

_IDLE_WAKES_PER_S = 20.0
"""Code outside steps is idle only if threads are woken less often than this, since an upload sleeps for most of its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """A worker's stay in one moment. Times are in seconds, and count only while the workers were observed.

    still_s: since the moment was first seen. stopped_s, idle_s: how long the process has been stopped, or idle, without a break. A process
    that is stopped and continued in turns may be stopped whenever it is seen; what it has used shows that it ran in between.
    ran_s, delayed_s: how long the training thread ran, and waited for a processor. awaited_s: how long others have waited for it.
    """

    moment: str | None = None
    seen_at: float = 0.0
    still_s: float = 0.0
    stopped_s: float = 0.0
    idle_s: float = 0.0
    ran_s: float = 0.0
    delayed_s: float = 0.0
    awaited_s: float = 0.0
    stopped: bool = False
    awaited: bool = False
    usage: Usage | None = None

    def after(self, seen: Observed, credit_s: float, *, awaited: bool) -> Stay:
        """Returns the stay after one more observation; `credit_s` is the time since the last one, as far as it counts."""
        here = {"moment": seen.moment, "seen_at": seen.seen_at, "stopped": seen.stopped, "awaited": awaited, "usage": seen.usage}
        if seen.moment != self.moment:
            return Stay(**here)  # pyright: ignore[reportArgumentType]
        stopped_s = self.stopped_s + credit_s if seen.stopped and self.stopped and not self._ran(seen) else 0.0
        awaited_s = self.awaited_s + credit_s if awaited and self.awaited else 0.0
        return replace(
            self, **here, **self._used(seen, credit_s), still_s=self.still_s + credit_s, stopped_s=stopped_s, awaited_s=awaited_s
        )

    def _ran(self, seen: Observed) -> bool:
        """Whether any of its threads has run since the last observation, as far as that is known."""
        before, now = self.usage, seen.usage
        return before is not None and now is not None and (now.ran_s > before.ran_s or now.wakes > before.wakes)

    def _used(self, seen: Observed, credit_s: float) -> dict[str, float]:
        """Returns the sums of what was used, with the last interval."""
        before, now = self.usage, seen.usage
        if before is None or now is None or not credit_s:
            return {}
        ran, delayed = now.ran_s - before.ran_s, now.delayed_s - before.delayed_s
        others = max(0.0, now.cpu_s - before.cpu_s - ran)
        idle = (
            not (now.running or seen.stopped or self.stopped)
            and ran + delayed <= _IDLE_SHARE * credit_s
            and others <= _IDLE_CPU_SHARE * credit_s
            and now.io_bytes - before.io_bytes <= _IDLE_IO_BYTES
            and (not seen.outside or now.wakes - before.wakes <= _IDLE_WAKES_PER_S * credit_s)
        )
        return {"idle_s": self.idle_s + credit_s if idle else 0.0, "ran_s": self.ran_s + ran, "delayed_s": self.delayed_s + delayed}
