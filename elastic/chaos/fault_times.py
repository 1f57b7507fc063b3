"""Times of an incident measured from an injected fault; the job itself measures from when the first worker was missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def since_fault(incident: Mapping[str, Any], at: float) -> dict[str, Any]:
    """Returns an incident as JSON, with its times measured from the monotonic time `at` at which the fault was injected.

    `stall_ms` stays: it is measured from when the step would have been committed.
    """
    earlier = 1000 * (incident["at"] - at)
    changes = {"detected_ms": earlier, "running_ms": earlier, "lost_ms": -earlier}
    moved = {name: round(max(0.0, incident[name] + change), 3) for name, change in changes.items() if incident[name] is not None}
    return {**incident, **moved, "at": at}
