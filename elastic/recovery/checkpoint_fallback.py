"""Checkpoint fallback: if no copy of some part of the state is left, all members begin the next view with the newest checkpoint.

Steps that were yielded before are taken again without being yielded again: user code notices only the time it takes. If nothing was saved
yet, new workers begin with the initial state: only workers that have not trained still have it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from elastic.observe.incident import INITIAL_STATE


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Checkpoint:
    """A committed checkpoint: its `order` (steps taken, epoch, attempt) and the name of its directory. A newer one compares greater."""

    order: tuple[int, int, int]
    name: str

    def __str__(self) -> str:
        return f"the {'' if self.name == INITIAL_STATE else 'checkpoint '}{self.name}"

    @property
    def step(self) -> int:
        """The newest step in the checkpoint."""
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
"""The state before the first step, as workers build it from the seed."""


def newest(seen: Iterable[Checkpoint | None], unreadable: Collection[str] = ()) -> Checkpoint | None:
    """Returns the newest checkpoint that a worker sees and none found `unreadable`: one that any worker sees is committed for all."""
    return max((checkpoint for checkpoint in seen if checkpoint is not None and checkpoint.name not in unreadable), default=None)
