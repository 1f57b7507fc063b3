"""A script without the `__main__` guard."""

from __future__ import annotations

import elastic


def train() -> None:
    """Never reached."""


elastic.run(train, workers=1)
