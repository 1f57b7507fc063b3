"""The copies that a worker can send: complete runs of state, each of one step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic.engine.shard import Shard
from elastic.layout.regions import PARAM, SAME
from elastic.layout.transfer import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A copy of the run `[start, stop)` of a layer at step `step`: `memory` by state; a gathered run has only the parameter.

    `scalars` is the optimizer state of its parameters without their shape. `digest` is that of all its memory, where it is known.
    """

    layer: int
    start: int
    stop: int
    step: int
    role: Role
    memory: Mapping[str, torch.Tensor]
    scalars: Mapping[str, Mapping[str, Any]]
    digest: str | None = None


class UnreplayedCopy:
    """A copy one update newer than the replica kept for `owner`: it is computed when its memory or scalars are first read."""

    role: Role = "replica"

    def __init__(self, shard: Shard, step: int, make: Callable[[], Shard]) -> None:
        self.layer, self.start, self.stop, self.step = shard.layer, shard.interval.start, shard.interval.stop, step
        self.owner = shard.interval.owner
        self._make = make

    @functools.cached_property
    def _made(self) -> Shard:
        return self._make()

    @property
    def memory(self) -> Mapping[str, torch.Tensor]:
        return self._made.memory

    @property
    def scalars(self) -> Mapping[str, Mapping[str, Any]]:
        return self._made.scalars


StoredCopy = Held | UnreplayedCopy


def held(shard: Shard, step: int, role: Role, scalars: Mapping[str, Mapping[str, Any]]) -> Held:
    """Wraps a shard as a copy that can be sent."""
    interval = shard.interval
    return Held(
        layer=shard.layer, start=interval.start, stop=interval.stop, step=step, role=role, memory=dict(shard.memory), scalars=scalars
    )


def runs(
    held: Iterable[StoredCopy], step: int, state: str, layer: int, start: int, stop: int
) -> list[tuple[int, int, torch.Tensor | None]]:
    """Returns the ascending disjoint pieces `(start, stop, memory)` that are held of a run at a step.

    The memory is None where the run is held but its optimizer has not created this state: it counts as zeros.
    """
    found: list[tuple[int, int, torch.Tensor | None]] = []
    position = start
    fitting = [h for h in held if h.step == step and h.layer == layer and (state == PARAM or h.role != "gathered")]
    while position < stop:
        covering = [h for h in fitting if h.start <= position < h.stop]
        if not covering:
            position = min([stop, *(h.start for h in fitting if h.start > position)])
            continue
        best = max(covering, key=lambda h: h.stop)
        end = min(stop, best.stop)
        memory = best.memory.get(state)
        found.append((position, end, None if memory is None else memory[position - best.start : end - best.start]))
        position = end
    return found


def dtypes(held: Sequence[StoredCopy], layer_dtypes: Mapping[int, torch.dtype]) -> dict[str, str]:
    """Maps every optimizer state to its dtype name: `SAME` where it is that of the layer's masters or, without them, parameters."""
    found: dict[str, str] = {}
    for copy in held:
        for state, memory in copy.memory.items():
            if state != PARAM:
                own = memory.dtype == layer_dtypes[copy.layer]
                name = SAME if own else str(memory.dtype).removeprefix("torch.")
                if found.setdefault(state, name) == SAME:
                    found[state] = name
    return found
