"""Long computations that can be left off: generators that yield every few milliseconds, and give their result in the end."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def finish(going: Generator[None, None, T]) -> T:
    """Runs the rest in one go; its result."""
    while True:
        try:
            next(going)
        except StopIteration as end:
            return end.value
