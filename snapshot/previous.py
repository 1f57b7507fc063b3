"""Previous copies: a worker's owned shards one step ago, so that a step that only some workers applied can be undone.

A save reads the same copy: it borrows the memory, and previous copies go to a second buffer until it is returned. Where owned shards are
compared with replicas, a copy that was found equal is kept in the same way until the next one was: if copies differ, all go back to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from elastic.engine.zero import ShardedOptimizer
from elastic.memory.tensors import lasting_copy
from elastic.snapshot.held_copies import Held, StoredCopy


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory for one copy of all owned shards. It is written to only if it is neither `lent` nor kept."""

    memory: dict[tuple[int, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    lent: bool = False


class Observer(Protocol):
    """What is informed of changes of the previous copies' memory."""

    def overwrites_previous(self) -> None: ...
    def has_previous(self, step: int, held: Sequence[Held]) -> None: ...


class PreviousCopies:
    """Keeps the previous copy of every owned shard, in memory that is reused; and an older one, `kept`, to go back to.

    `waited_s`: for how many seconds steps have waited for copies that are made beside the computation.
    """

    waited_s = 0.0

    def __init__(self, optimizer: ShardedOptimizer, observer: Observer | None = None) -> None:
        self._updater, self._observer = optimizer.owned, observer
        self._buffer = Buffer()
        self._buffers: list[Buffer] = [self._buffer]
        self._set_aside: Buffer | None = None
        self.step: int | None = None
        self.held: list[Held] = []
        self.kept: list[Held] = []

    @property
    def bytes(self) -> int:
        """Memory of all buffers, including one lent to a save, and one that is kept."""
        buffers = [previous for buffer in self._buffers for previous in buffer.memory.values()]
        return sum(memory.nbytes for previous in buffers for memory in previous.values())

    def begin(self, step: int) -> None:
        """Notes that the owned shards are at step `step` now: where they lie on a device, their copy is begun."""

    def settle(self) -> None:
        """Waits for the copy that was begun."""

    def first(self, step: int) -> list[Held] | None:
        """Returns a copy of the state that a view begins with, if shards lie on a device; on the CPU they outlive the process."""

    def take(self, step: int) -> None:
        """Copies the owned shards, which are at step `step`, unless they were copied already."""
        if self.step == step:
            return
        if self._buffer.lent or self._buffer is self._set_aside:
            self._buffer = self._another()
        self.step, self.held = None, []  # these are two steps old and about to be overwritten
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
        self.step = step
        if self._observer is not None:
            self._observer.has_previous(step, self.held)

    def keep(self, held: Sequence[StoredCopy]) -> None:
        """Keeps the present previous copy, `held` with its digests, until `keep` is called again: its memory is not written to."""
        self._set_aside = self._buffer
        self.kept = [replace(copy, role="kept") for copy in held if isinstance(copy, Held)]

    def lend(self) -> Callable[[], None]:
        """Lends the memory of `held`: it is not written to until a thread calls the returned function. One is lent at a time."""
        lent = self._buffer
        lent.lent = True

        def returned() -> None:
            lent.lent = False

        return returned

    def release(self) -> None:
        """Lets go of all memory, except what others use."""
        self._buffers, self._buffer, self._set_aside = [], Buffer(), None
        self.held, self.kept, self.step = [], [], None

    def _another(self) -> Buffer:
        for buffer in self._buffers:
            if not buffer.lent and buffer is not self._set_aside:
                return buffer
        self._buffers.append(Buffer())
        return self._buffers[-1]

    def _copy(self, key: tuple[int, int], source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if key[0] in self._updater.still:
            return dict(source)  # nothing changes it
        previous = self._buffer.memory.setdefault(key, {})
        for name, values in source.items():
            if name in previous:
                previous[name].copy_(values)
            else:
                previous[name] = lasting_copy(values)
        return dict(previous)
