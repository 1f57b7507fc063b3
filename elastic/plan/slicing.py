"""Long computations in slices: generators that yield every few milliseconds and return their result."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def finish(going: Generator[None, None, T]) -> T:
    """Runs the rest without pause and returns the result."""
    while True:
        try:
            next(going)
        except StopIteration as end:
            return end.value
