"""Previous copies of a worker that computes on a device: in host memory, and made while the next step computes.

Device memory is lost with its process. So the owned shards as of each step are copied to memory that outlives the process (the worker's
segment), on a stream of their own. A worker sends READY for a step only when the copy of the step before is over: then no step is applied
anywhere before each worker has a copy of the step before. There are two copies, of the last two steps; the older one is overwritten only
after the next update here, when every worker has the newer one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from elastic.engine.shard import Shard
from elastic.engine.zero import ShardedOptimizer
from elastic.memory.device import SideStream
from elastic.memory.pinned import PinnedMemory
from elastic.snapshot.held_copies import Held, held
from elastic.snapshot.previous import Buffer, PreviousCopies


class CopyObserver(Protocol):
    """What is informed of changes of the copies' memory."""

    def overwrites_copy(self, step: int) -> None: ...
    def has_copy(self, step: int, held: Sequence[Held]) -> None: ...


class HostCopies(PreviousCopies):
    """The host's copies of the owned shards."""

    def __init__(self, optimizer: ShardedOptimizer, observer: CopyObserver | None = None) -> None:
        super().__init__(optimizer)
        self._told = observer
        self._side, self._pinned = SideStream(), PinnedMemory()
        self._ahead: Buffer | None = None
        self._ahead_step: int | None = None
        self._ahead_held: list[Held] = []
        self._over = True
        self._still: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # of what nothing changes: one copy for all steps

    @property
    def bytes(self) -> int:
        """Memory of all buffers, and of what nothing changes."""
        return super().bytes + sum(each.nbytes for memory in self._still.values() for each in memory.values())

    def begin(self, step: int) -> None:
        """Begins to copy the owned shards, which are at step `step`; returns at once. They must not be written to before `settle`."""
        if self._ahead_step == step or self.step == step:
            return
        buffer = self._ahead = self._free()
        if self._told is not None:
            self._told.overwrites_copy(step)
        shards = self._updater.shards
        scalars = {key: self._updater.scalars(shard) for key, shard in shards.items()}  # some lie on the device: not on the side stream
        began = time.perf_counter()
        with self._side.after_computation():
            copies = [held(self._copied(buffer, key), step, "previous", scalars[key]) for key in shards]
        if self._pinned.refused:  # the copies were made in the call
            self.waited_s += time.perf_counter() - began
        self._ahead_step, self._ahead_held, self._over = step, copies, False

    def first(self, step: int) -> list[Held]:
        """Returns a copy of the shards with which a view begins, at `step`; the observer is not informed."""
        told, waited = self._told, self.waited_s
        self._told = None
        self.begin(step)
        self.settle()
        self._told, self.waited_s = told, waited  # no step has waited for it
        return self._ahead_held

    def settle(self) -> None:
        """Waits until the copy that was begun is over."""
        if self._over:
            return
        if not self._side.over:
            began = time.perf_counter()
            self._side.wait()
            self.waited_s += time.perf_counter() - began
        self._side.wait()
        self._over = True
        if self._told is not None and self._ahead_step is not None:
            self._told.has_copy(self._ahead_step, self._ahead_held)

    def take(self, step: int) -> None:
        """Makes the copy of `step` the previous copy; it is made now if it was not begun."""
        if self.step == step:
            return
        self.begin(step)
        self.settle()
        assert self._ahead is not None  # begun above
        self._buffer, self.step, self.held = self._ahead, step, self._ahead_held
        self._ahead, self._ahead_step = None, None

    def release(self) -> None:
        """Waits for the copies, and lets go of all memory, except what others use."""
        self._side.wait()
        self._pinned.release()
        self._ahead, self._ahead_step, self._ahead_held, self._over = None, None, [], True
        self._still = {}
        super().release()

    def _free(self) -> Buffer:
        """Returns a buffer that is neither the previous copy, nor lent, nor kept."""
        for buffer in self._buffers:
            if buffer is not self._buffer and not buffer.lent and buffer is not self._set_aside:
                return buffer
        self._buffers.append(Buffer())
        return self._buffers[-1]

    def _copied(self, buffer: Buffer, key: tuple[int, int]) -> Shard:
        shard = self._updater.shards[key]
        if key in self._still:
            return replace(shard, memory=dict(self._still[key]))
        memory = self._still.setdefault(key, {}) if key[0] in self._updater.still else buffer.memory.setdefault(key, {})
        for name, values in shard.memory.items():
            if name not in memory:
                memory[name] = self._pinned.lasting(values.numel(), values.dtype)
            with torch.no_grad():
                memory[name].copy_(values, non_blocking=True)
        return replace(shard, memory=dict(memory))
