"""Reads the clocks of kinds of devices from TOML or JSON files, for plans on paper.

[[kinds]]
name = "V100-16"
usual = 250                          # the setting without a choice: a clock in MHz, or a power limit in watts
idle_w = 40.0
measured = [[250, 1.00, 247.0], ...] # setting, seconds of the same work, mean watts during it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic.errors import PlanError
from elastic.plan.clocks import ClockChoices, ClockPoint
from elastic.plan.file_fields import item, join, name, number, numbers, sequence, whole
from elastic.plan.files import named, read


def load(path: Path) -> dict[str, ClockChoices]:
    """Returns the clocks by kind. Raises PlanError, naming the file and the wrong field."""
    with named(path):
        return dict(sequence(item(read(path), "kinds", ""), "kinds", _kind))


def _kind(data: Any, field: str) -> tuple[str, ClockChoices]:
    kind, usual = name(item(data, "name", field), join(field, "name")), whole(item(data, "usual", field), join(field, "usual"))
    rows = sequence(item(data, "measured", field), join(field, "measured"), _row)
    at_usual = next((seconds for setting, seconds, _ in rows if setting == usual), None)
    if at_usual is None or not at_usual > 0:
        raise PlanError(f"{join(field, 'measured')} must have a row of the usual setting, {usual}, with seconds above 0")
    points = tuple(ClockPoint(setting, seconds / at_usual, watts) for setting, seconds, watts in sorted(rows, reverse=True))
    return kind, ClockChoices(points=points, usual=usual, idle_w=number(item(data, "idle_w", field), join(field, "idle_w")))


def _row(row: Any, field: str) -> tuple[int, float, float]:
    values = numbers(row, field)
    if len(values) != 3:
        raise PlanError(f"{field} must be [setting, seconds, watts], not {row!r}")
    return whole(values[0], field), values[1], values[2]
