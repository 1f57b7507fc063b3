"""Which share of the time the quota of a control group keeps a process from running.

A process that has used up its group's quota of a period (`cpu.max`) waits, runnable, for the next period. /proc/PID/schedstat counts how
long its first thread was runnable without a processor, and the group's cpu.stat in how many periods the quota was used up. Both are needed:
on a crowded host processes wait too, and a group may use up its quota while this process does nothing. (`throttled_usec` is not used: what
it counts differs between kernels.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

EVERY_S = 1.0
"""Time between two readings: several periods of a usual quota, and of an unusual one."""

USED_UP = 0.5
"""The least share of a group's periods in which its quota was used up."""

_GROUPS = Path("/sys/fs/cgroup")
_PROCESSES = Path("/proc")
_NANOSECOND = 1e-9


@dataclass(slots=True)
class _Reading:
    at: float
    waited_s: float
    periods: dict[Path, tuple[int, int]]
    share: float = 0.0


@dataclass(slots=True)
class Quotas:
    """Reads processes of this host. `groups` is where control groups of version 2 or 1 are mounted, `processes` is /proc."""

    groups: Path = _GROUPS
    processes: Path = _PROCESSES
    _last: dict[int, _Reading] = field(default_factory=dict)

    def held(self, pid: int | None, now: float) -> float:
        """Returns the share, 0 to 1, of about the last second in which its groups' quotas kept the process from running.

        0 without such a quota, or if nothing is known. `now` is of a monotonic clock, in seconds.
        """
        last = self._last.get(pid) if pid is not None else None
        if pid is None or (last is not None and now - last.at < EVERY_S):
            return 0.0 if last is None else last.share
        periods = dict(self._periods(pid))
        if not periods:
            self._last[pid] = _Reading(now, 0.0, periods)
            return 0.0
        found = _Reading(now, self._waited_s(pid), periods)
        if (
            last is not None
            and last.periods
            and any(_used_up(last.periods[group], periods[group]) for group in periods.keys() & last.periods)
        ):
            found.share = min(1.0, max(0.0, (found.waited_s - last.waited_s) / (now - last.at)))
        self._last[pid] = found
        return found.share

    def forget(self, pid: int | None) -> None:
        """Forgets a process that has ended."""
        self._last.pop(pid or 0, None)

    def _periods(self, pid: int) -> Iterator[tuple[Path, tuple[int, int]]]:
        """Yields the process's groups that have a quota: how many periods have passed, and in how many it was used up."""
        for folder in self._folders(pid):
            with suppress(OSError, ValueError):
                counts = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
                if int(counts.get("nr_periods", 0)):
                    yield folder, (int(counts["nr_periods"]), int(counts["nr_throttled"]))

    def _folders(self, pid: int) -> Iterator[Path]:
        """Yields the folders of the process's control groups for processor time, its own first, then those around it."""
        lines: list[str] = []
        with suppress(OSError):
            lines = (self.processes / str(pid) / "cgroup").read_text().splitlines()
        for line in lines:
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = self.groups / controllers
            path = top / name.lstrip("/")
            yield from (folder for folder in (path, *path.parents) if folder.is_relative_to(top))

    def _waited_s(self, pid: int) -> float:
        with suppress(OSError, ValueError, IndexError):
            return int((self.processes / str(pid) / "schedstat").read_text().split()[1]) * _NANOSECOND
        return 0.0


def _used_up(before: tuple[int, int], now: tuple[int, int]) -> bool:
    periods, times = now[0] - before[0], now[1] - before[1]
    return periods > 0 and times >= USED_UP * periods
