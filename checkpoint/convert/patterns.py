"""Compiles the user's regular expressions."""

from __future__ import annotations

import re

from elastic.errors import CheckpointError


def compiled(pattern: str) -> re.Pattern[str]:
    """Compiles a regular expression. Raises CheckpointError if it is not one."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise CheckpointError(f"{pattern!r} in a rule is not a regular expression: {error}") from error
