"""The fallback below replicas: where no copy of some part of the state is left, all members begin the next view with the newest checkpoint.

Steps that were handed out before are taken again, and not handed out again: user code notices nothing but the time it takes. Where nothing
was saved yet, new workers begin again with the initial state: only who has not trained yet still has it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from elastic.observe.incident import INITIAL_STATE


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Checkpoint:
    """A committed checkpoint, by its `order` (steps taken, epoch, attempt) and the name of its directory. Newer is greater."""

    order: tuple[int, int, int]
    name: str

    def __str__(self) -> str:
        return f"the {'' if self.name == INITIAL_STATE else 'checkpoint '}{self.name}"

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


INITIAL = Checkpoint(order=(0, 0, 0), name=INITIAL_STATE)
"""The state before the first step, which workers have built from the seed and not trained yet."""


def newest(seen: Iterable[Checkpoint | None], unreadable: Collection[str] = ()) -> Checkpoint | None:
    """Of those that workers see: what one of them sees is committed, so the others find it too. Without those that are `unreadable`."""
    return max((checkpoint for checkpoint in seen if checkpoint is not None and checkpoint.name not in unreadable), default=None)
