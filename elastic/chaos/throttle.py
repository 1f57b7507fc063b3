"""Slows down workers of a running job: stops and continues their processes in turns (SIGSTOP, SIGCONT).

A worker slowed by 3 runs a third of the time, in slices that are short compared with a layer.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from pathlib import Path

from elastic.chaos.roster import RosterFile, Victim
from elastic.errors import SettingsError

PERIOD_S = 0.02
_LOOK_S = 0.05


class Throttle:
    """Slows the members at these places of the newest view by these factors, in its own thread, until it is closed.

    `cycles` counts the periods in which workers were stopped. Raises SettingsError on a factor below 1.
    """

    def __init__(self, directory: Path | str, factors: Mapping[int, float]) -> None:
        for place, factor in factors.items():
            if not factor >= 1.0:
                raise SettingsError(f"place {place} cannot be slowed by {factor}: a factor of 2 makes it half as fast")
        self._directory, self._factors = Path(directory), dict(factors)
        self._closing = threading.Event()
        self.cycles = 0
        self._thread = threading.Thread(target=self._run, name="elastic-throttle", daemon=True)
        self._thread.start()

    def __enter__(self) -> Throttle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the slowdown: all workers run at full speed again."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        rosters, targets, epoch = RosterFile(self._directory / "members.json"), {}, 0
        try:
            while not self._closing.is_set():
                roster = rosters.read()
                if roster is not None and roster.epoch != epoch:
                    epoch = roster.epoch
                    for target in targets.values():
                        target.close()
                    targets = {
                        place: Victim(self._directory, *roster.members[place], roster.forkserver)
                        for place in self._factors
                        if place < len(roster.members)
                    }
                self._cycle(targets)
        finally:
            for target in targets.values():
                target.send(signal.SIGCONT)
                target.close()

    def _cycle(self, targets: Mapping[int, Victim]) -> None:
        """Runs one period: stops all targets, and continues each one when its share of the period is left."""
        if not targets:
            self._closing.wait(_LOOK_S)
            return
        for target in targets.values():
            target.send(signal.SIGSTOP)
        self.cycles += 1
        passed = 0.0
        for place in sorted(targets, key=lambda place: self._factors[place]):
            until = PERIOD_S * (1 - 1 / self._factors[place])
            self._closing.wait(until - passed)
            passed = until
            targets[place].send(signal.SIGCONT)
        self._closing.wait(PERIOD_S - passed)
