"""What a member needs of the job's checkpoints when the state is nowhere in memory any more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from elastic.engine.view_state import ViewState
from elastic.recovery.stored import Checkpoint
from elastic.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a worker begins a view with: its part of a checkpoint's state, the settings with it, and states of registered objects."""

    state: ViewState
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any] | None
    attributes: dict[str, Any] = field(default_factory=dict)
    objects: list[Any] | None = None


class Fallback(Protocol):
    """A job's checkpoints, seen by one worker. `unreadable` names those that it could not read."""

    unreadable: set[str]

    def newest(self) -> Checkpoint | None:
        """The newest good one that this worker sees and did not find damaged, None if there is none."""
        ...

    def restore(self, view: View, checkpoint: Checkpoint) -> Restored:
        """This worker's part of it in `view`. Raises CheckpointDamaged, or CheckpointError if it is not of this job's model."""
        ...
