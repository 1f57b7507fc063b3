"""Placement of the devices of a DT-FM network."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from planner_timing import timed


def place(path: Path, repeat: int) -> dict[str, Any]:
    """The cost of the placement, the median time of the search, and the devices of each group in pipeline order."""
    placement = importlib.import_module("elastic.plan.placement")
    instance = importlib.import_module("elastic.plan.sources.dtfm").load(path)
    sizes = (instance.latency_s, instance.bytes_per_s, instance.groups, instance.exchange_bytes, instance.boundary_bytes)
    found, search_s = timed(lambda: placement.place(*sizes), repeat)
    return {"cost_s": found.cost_s, "search_s": search_s, "groups": [list(group) for group in found.groups]}
