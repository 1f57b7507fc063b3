"""Counts a job's successful and failed saves from the coordinators' reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSummary:
    """The saves of a job: `saved` and `failed` count them; `newest` is the number of steps in the newest one, None if there is none.

    `failed_since` counts the failures after the newest save; `last_failure` is the reason of the last of them.
    """

    saved: int = 0
    failed: int = 0
    newest: int | None = None
    failed_since: int = 0
    last_failure: str | None = None

    def heard(self, step: int, reason: str | None) -> SaveSummary:
        """Returns the summary with one more save, of the state after `step` steps, which failed for `reason` (None: it succeeded)."""
        if reason is None:
            return replace(self, saved=self.saved + 1, newest=max(step, self.newest or 0), failed_since=0, last_failure=None)
        return replace(self, failed=self.failed + 1, failed_since=self.failed_since + 1, last_failure=f"after {step} steps: {reason}")

    @property
    def warning(self) -> str | None:
        """The warning for the user at the end of the job, None if its last save succeeded or it had none."""
        if not self.failed_since:
            return None
        last = "no checkpoint was saved" if self.newest is None else f"the newest checkpoint is that after {self.newest} steps"
        count = f"{self.failed_since} save{'s' * (self.failed_since != 1)}"
        return f"{last}: {count} failed, the last for this reason: {self.last_failure}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
