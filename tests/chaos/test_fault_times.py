"""Tests an incident's figures relative to the moment of an injected fault."""

from __future__ import annotations

from elastic.chaos.fault_times import since_fault
from elastic.observe.incident import Incident


def test_times_count_from_the_fault() -> None:
    found = Incident(kind="death", at=100.0, detected_ms=0.5, running_ms=80.0, lost_ms=200.0, stall_ms=300.0).to_json()
    moved = since_fault(found, 99.99)
    assert (moved["detected_ms"], moved["running_ms"], moved["lost_ms"], moved["stall_ms"]) == (10.5, 90.0, 190.0, 300.0)
    assert since_fault({**found, "lost_ms": None}, 99.99)["lost_ms"] is None
