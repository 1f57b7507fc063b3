"""Regular expressions that a user states."""

from __future__ import annotations

import re

from elastic.errors import CheckpointError


def compiled(pattern: str) -> re.Pattern[str]:
    """CheckpointError if it is no regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise CheckpointError(f"a rule has the regular expression {pattern!r}: {error}") from error
