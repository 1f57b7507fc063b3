"""A worker's reports on committed steps, for those who look at the job. Every worker keeps the last ones, only the leader sends them.

When the leader is lost, the next one sends those that the agent may not have; the agent drops what it knows. So each step arrives once,
unless all workers die together: then those of the last EVERY_S seconds are lost to the record (not to the training).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from elastic.observe.step_log import Step

EVERY_S = 0.25
_KEPT = 1024


class ToldSteps:
    """The reports of one worker. `send` sends a message to the agent; `leads` tells whether this worker is the leader now."""

    def __init__(self, send: Callable[[dict[str, Any]], None], leads: Callable[[], bool]) -> None:
        self._send, self._leads = send, leads
        self._rows: deque[list[Any]] = deque(maxlen=_KEPT)
        self._told, self._told_at = -1, 0.0

    def note(self, step: Step) -> None:
        """Notes a step that the loop is given now, and sends it, with those before it, unless some were sent just before."""
        self._rows.append(step.to_row())
        if time.monotonic() - self._told_at >= EVERY_S:
            self.tell()

    def tell(self) -> None:
        """Sends the steps that were not sent yet."""
        rows = [row for row in self._rows if row[0] > self._told] if self._leads() else []
        if rows:
            self._told, self._told_at = rows[-1][0], time.monotonic()
            self._send({"type": "steps", "rows": rows})
