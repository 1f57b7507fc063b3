"""Previous copies: a worker's owned shards one step ago, so that a step that only some workers applied can be undone.

A save reads the same copy: it borrows the memory, and previous copies go to a second buffer until it is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from elastic.engine.zero import ShardedOptimizer
from elastic.memory.tensors import lasting_copy
from elastic.snapshot.held_copies import Held

Buffer = dict[tuple[int, int], dict[str, torch.Tensor]]


class Observer(Protocol):
    """What is informed of changes of the previous copies' memory."""

    def overwrites_previous(self) -> None: ...
    def has_previous(self, step: int, held: Sequence[Held]) -> None: ...


class PreviousCopies:
    """Keeps the previous copy of every owned shard, in memory that is reused."""

    def __init__(self, optimizer: ShardedOptimizer, observer: Observer | None = None) -> None:
        self._updater, self._observer = optimizer.owned, observer
        self._memory: Buffer = {}
        self._free: list[Buffer] = []
        self._buffers: list[Buffer] = [self._memory]
        self._lent = False
        self._step: int | None = None
        self.held: list[Held] = []

    @property
    def bytes(self) -> int:
        """Memory of all buffers, including one lent to a save."""
        return sum(memory.nbytes for buffer in self._buffers for previous in buffer.values() for memory in previous.values())

    def take(self, step: int) -> None:
        """Copies the owned shards, which are at step `step`, unless they were copied already."""
        if self._step == step:
            return
        if self._lent:
            self._memory, self._lent = self._another(), False
        self._step, self.held = None, []  # these are two steps old and about to be overwritten
        if self._observer is not None:
            self._observer.overwrites_previous()
        self.held = [
            Held(
                layer=shard.layer,
                start=shard.interval.start,
                stop=shard.interval.stop,
                step=step,
                role="previous",
                memory=self._copy(key, shard.memory),
                scalars=self._updater.scalars(shard),
            )
            for key, shard in self._updater.shards.items()
        ]
        self._step = step
        if self._observer is not None:
            self._observer.has_previous(step, self.held)

    def lend(self) -> Callable[[], None]:
        """Lends the memory of `held`: it is not written to until a thread calls the returned function. One is lent at a time."""
        lent, self._lent = self._memory, True
        return lambda: self._free.append(lent)

    def release(self) -> None:
        """Lets go of all memory, except what others use."""
        self._buffers, self._free, self._memory, self.held, self._step = [], [], {}, [], None

    def _another(self) -> Buffer:
        if self._free:  # may be the lent one, if it was returned
            return self._free.pop()
        self._buffers.append({})
        return self._buffers[-1]

    def _copy(self, key: tuple[int, int], source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        previous = self._memory.setdefault(key, {})
        for name, values in source.items():
            if name in previous:
                previous[name].copy_(values)
            else:
                previous[name] = lasting_copy(values)
        return dict(previous)
