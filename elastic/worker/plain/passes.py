"""The passes over the data: how many steps have been taken when each ends, also behind passes that were left before their end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Passes:
    """A worker that joins, and one that continues from a checkpoint, get its state: only who was there knows where passes were left.

    `end_of(number)` is the number of steps taken in all when a pass ends, if none is left early. `whole`: the pass behind one that was left
    has all its steps; otherwise it has those that are left, as if there was one pass.
    """

    def __init__(self, end_of: Callable[[int], int], *, whole: bool) -> None:
        self._end_of, self.whole = end_of, whole
        self._number = 0  # passes before this one are over
        self._skipped = 0  # steps that passes would have had that were left
        self._counts: list[int] = []  # the first pass of each count of epochs

    def end(self, number: int) -> int:
        """Returns the number of steps that are taken in all when the pass ends; 0 if it is over."""
        return 0 if number < self._number else self._end_of(number) - self._skipped

    def length(self, number: int) -> int:
        """Returns the number of steps of a pass that is not left early."""
        return self._end_of(number) - (self._end_of(number - 1) if number else 0)

    def left(self, number: int, taken: int) -> None:
        """Notes that a pass is left when so many steps have been taken in all."""
        rest = self.end(number) - taken
        if self.whole and rest > 0:
            self._number, self._skipped = number + 1, self._skipped + rest

    def current(self, number: int, taken: int) -> int:
        """Returns the first pass, from this one on, that is not over when so many steps are taken."""
        while self.whole and self.end(number) <= taken:
            number += 1
        return number

    def first_of(self, count: int, number: int, taken: int) -> int:
        """Returns the first pass of a count of epochs, which begins here when so many steps are taken, with this pass or a later one.

        `count` is the number of counts before. One that has begun elsewhere begins with the same pass here.
        """
        if count == len(self._counts):
            self._counts.append(self.current(number, taken))
        return self._counts[count]

    def over_at(self, count: int) -> float:
        """Returns the pass with which the next count of epochs has begun."""
        return self._counts[count + 1] if count + 1 < len(self._counts) else math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number, "skipped": self._skipped, "counts": list(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number, self._skipped, self._counts = state["number"], state["skipped"], list(state.get("counts", [0]))
