"""The passes over the data: how many steps have been taken when each ends, also behind passes that were left before their end."""

from __future__ import annotations

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

    def state_dict(self) -> dict[str, Any]:
        return {"number": self._number, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number, self._skipped = state["number"], state["skipped"]
