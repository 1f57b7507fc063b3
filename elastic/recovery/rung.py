"""The rung below replicas: where no copy of some part of the state is left, all members begin the next view with the newest checkpoint.

Steps that were handed out before are taken again, and not handed out again: user code notices nothing but the time it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Checkpoint:
    """A committed checkpoint, by its `order` (steps taken, epoch, attempt) and the name of its directory. Newer is greater."""

    order: tuple[int, int, int]
    name: str

    @property
    def step(self) -> int:
        """The newest step that is in it."""
        return self.order[0] - 1

    def to_json(self) -> list[Any]:
        """One flat list."""
        return [*self.order, self.name]

    @classmethod
    def from_json(cls, data: list[Any]) -> Checkpoint:
        """The inverse of `to_json`."""
        steps, epoch, attempt, name = data
        return cls(order=(steps, epoch, attempt), name=name)


def newest(seen: Iterable[Checkpoint | None], unreadable: Collection[str] = ()) -> Checkpoint | None:
    """Of those that workers see: what one of them sees is committed, so the others find it too. Without those that are `unreadable`."""
    return max((checkpoint for checkpoint in seen if checkpoint is not None and checkpoint.name not in unreadable), default=None)
