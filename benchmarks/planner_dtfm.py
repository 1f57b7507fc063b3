"""Places the devices of a DT-FM network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dtfm
from planner_timing import timed

from elastic.plan.placement import place as search


def place(path: Path, repeat: int) -> dict[str, Any]:
    """Returns the cost of the placement, the median time of the search, and the devices of each group in pipeline order."""
    instance = dtfm.load(path)
    sizes = (instance.latency_s, instance.bytes_per_s, instance.groups, instance.exchange_bytes, instance.boundary_bytes)
    found, search_s = timed(lambda: search(*sizes), repeat)
    return {"cost_s": sum(dtfm.cost(instance, found.groups)), "search_s": search_s, "groups": [list(group) for group in found.groups]}
