"""Chooses among several plans the one that takes least over the steps to come, the change to it included."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

HORIZON = 1000
"""Steps over which a migration has to pay, unless asked for otherwise."""


class Option(Protocol):
    """A plan to change to."""

    def over_s(self, horizon: float) -> float:
        """Seconds of so many of its steps, and of the change to it."""
        ...


O = TypeVar("O", bound=Option)  # noqa: E741


def least(candidates: Iterable[tuple[float, Callable[[], Iterable[O]]]], horizon: float, known: O | None = None) -> O | None:
    """The best option over `horizon` steps, `known` if none is better.

    A candidate is the seconds of its step and what makes options of it. To work out what a change costs takes time, so that is only done
    for candidates whose steps alone take less than the best option so far.
    """
    best = known
    for step_s, options in candidates:
        if best is not None and step_s * horizon >= best.over_s(horizon):
            continue
        for option in options():
            if best is None or option.over_s(horizon) < best.over_s(horizon):
                best = option
    return best
