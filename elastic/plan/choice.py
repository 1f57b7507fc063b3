"""Chooses the plan that takes least time over the next steps, the change to it included."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

HORIZON = 1000
"""Default number of steps over which a migration must pay off."""


class Option(Protocol):
    """A plan to change to."""

    def over_s(self, horizon: float) -> float:
        """Seconds of `horizon` of its steps, plus the change to it."""
        ...


O = TypeVar("O", bound=Option)  # noqa: E741


def least(candidates: Iterable[tuple[float, Callable[[], Iterable[O]]]], horizon: float, known: O | None = None) -> O | None:
    """Returns the best option over `horizon` steps, or `known` if none is better.

    A candidate is the seconds of its step, and a function that makes options of it. The cost of a change takes time to work out, so the
    function is called only if the candidate's steps alone take less than the best option so far.
    """
    best = known
    for step_s, options in candidates:
        if best is not None and step_s * horizon >= best.over_s(horizon):
            continue
        for option in options():
            if best is None or option.over_s(horizon) < best.over_s(horizon):
                best = option
    return best
