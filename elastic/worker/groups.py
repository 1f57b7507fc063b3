"""Converts a scheduler's state and a parameter group's settings to their form in a checkpoint."""

from __future__ import annotations

from typing import Any

from elastic.errors import CheckpointError
from elastic.worker.plain_state import to_plain


def plain_scheduler(scheduler: dict[str, Any]) -> Any:
    """Returns the scheduler's state as plain JSON. Raises CheckpointError for a value that has no JSON form."""
    try:
        return to_plain(scheduler)
    except TypeError as error:
        raise CheckpointError(f"the scheduler's state cannot be in a checkpoint: {error}") from error


def readable_group(group: dict[str, Any]) -> dict[str, Any]:
    """Returns hyperparameters as plain JSON, for other programs."""
    found: dict[str, Any] = {}
    for name, value in group.items():
        number = value.item() if hasattr(value, "item") and getattr(value, "numel", lambda: 0)() == 1 else value
        if isinstance(number, tuple):
            number = list(number)
        if number is None or isinstance(number, bool | int | float | str | list):
            found[name] = number
    return found
