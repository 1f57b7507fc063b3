"""The interface through which a member reloads the job's checkpoints when part of the state is lost from all memories."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from elastic.engine.view_state import ViewState
from elastic.recovery.checkpoint_fallback import Checkpoint
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """A worker's start of a view from a checkpoint: its part of the state, the settings, and the states of registered objects."""

    state: ViewState
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None
    attributes: dict[str, Any] = field(default_factory=dict)
    objects: list[Any] | None = None


class Fallback(Protocol):
    """A job's checkpoints as one worker sees them. `unreadable` names those that it could not read."""

    unreadable: set[str]

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint that this worker sees and did not find damaged, None if there is none."""
        ...

    def restore(self, view: View, checkpoint: Checkpoint) -> Restored:
        """Reads this worker's part in `view`. Raises CheckpointDamaged, or CheckpointError if it is not of this job's model."""
        ...
