"""Replicas of owned state in another worker's memory, kept up to date by *replay*.

After every update the owner sends the gradient that it applied to the holder of the shard's replica: a third of the bytes of AdamW's state.
The link verifies what arrives. Before READY of the next step, when all updates are here, the holder copies its replicas aside and applies
the same update to them. So a step's replicas are complete before the next step is applied anywhere, and those of the step before are
still there in case that some other worker's are not complete. Both lie in the holder's segment and outlive it: all workers of its host may
die when the owner's host is lost. Digests of owners' copies and of replicas are compared with READY (`comparison`).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from elastic.comm.message import MessageKind, Tag
from elastic.engine.reducer import OwnedGradient
from elastic.engine.reduction import Parts
from elastic.engine.shard import GradientScale, Shard, unscaled
from elastic.engine.tensor_links import Sink, TensorLinks
from elastic.engine.zero import ShardedOptimizer
from elastic.layout.regions import ModelSpec
from elastic.layout.transfer import PARAM
from elastic.memory.tensors import empty, lasting_copy, retyped
from elastic.snapshot.held_copies import Held, StoredCopy, UnreplayedCopy, held
from elastic.snapshot.rest_digests import CopyKey, Rest

_ALIGN = 64


@dataclass(slots=True, kw_only=True)
class Replica:
    """A shard kept for its owner, at step `step` (None: unusable, since it is damaged).

    `received` is the next update, if it has arrived. `previous` is a copy of the shard before its last update.
    """

    shard: Shard
    step: int | None
    sink: Sink  # uint8, receives the owner's next message
    awaited: Tag | None = None
    received: Update | None = None
    previous: Held | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One step's gradient of a shard, None where a parameter had none."""

    step: int
    parts: Parts


class Observer(Protocol):
    """What is informed of changes of the replicas' memory."""

    def overwrites_previous_replicas(self) -> None: ...
    def has_previous_replicas(self, step: int, held: Sequence[Held]) -> None: ...
    def replays(self) -> None: ...
    def replayed(self, step: int) -> None: ...
    def digested(self, step: int, digests: Mapping[tuple[int, int], Mapping[str, str]]) -> None: ...


class Replicator:
    """Replicates one worker's shards in one view: sends updates of those it owns, and keeps replicas of other workers'."""

    def __init__(
        self,
        worker: int,
        spec: ModelSpec,
        links: TensorLinks,
        optimizer: ShardedOptimizer,
        kept: Sequence[Shard],
        step: int,
        rest: Rest | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._rest, self._observer = rest, observer
        self._worker, self._spec, self._links, self._optimizer = worker, spec, links, optimizer
        optimizer.kept.bind(kept)
        self.replicas = [Replica(shard=shard, step=step, sink=self._room(shard)) for shard in kept]
        self._settings: dict[int, list[dict[str, Any]]] = {}
        self._skipped: set[int] = set()
        self._scales: dict[int, GradientScale] = {}

    def _is_still(self, replica: Replica) -> bool:
        """Returns whether nothing changes a replica: then it is one of each step, and no updates come."""
        return replica.shard.layer in self._spec.frozen

    @property
    def _changing(self) -> list[Replica]:
        return [replica for replica in self.replicas if not self._is_still(replica)]

    def _room(self, shard: Shard) -> Sink:
        still = shard.layer in self._spec.frozen
        return self._links.sink(empty(0 if still else self._prefix(shard) + shard.memory[PARAM].nbytes, torch.uint8))

    def _prefix(self, shard: Shard) -> int:
        return -(-len(shard.parameters(self._spec)) // (8 * _ALIGN)) * _ALIGN

    @property
    def peers(self) -> set[int]:
        """The workers that hold this worker's replicas, and those whose replicas it holds."""
        holders = {worker for shard in self._optimizer.owned.shards.values() for worker in shard.interval.replicas}
        return (holders | {replica.shard.interval.owner for replica in self.replicas}) - {self._worker}

    @property
    def state_bytes(self) -> int:
        """Memory of the replicas and of their previous copies."""
        previous = [memory.nbytes for replica in self._changing if replica.previous for memory in replica.previous.memory.values()]
        return sum(memory.nbytes for replica in self.replicas for memory in replica.shard.memory.values()) + sum(previous)

    @property
    def update_bytes(self) -> int:
        """Memory that receives the owners' updates."""
        return sum(replica.sink.size for replica in self.replicas)

    def begin(self, step: int, scale: GradientScale = unscaled, *, skipped: bool = False) -> None:
        """Stores the optimizer's settings before its step, the scale of gradients with masters, and whether the step is skipped."""
        self._settings = {known: settings for known, settings in self._settings.items() if known >= step - 1}
        self._settings[step] = self._optimizer.settings()
        self._scales = {known: each for known, each in self._scales.items() if known in self._settings} | {step: scale}
        self._skipped = {known for known in self._skipped if known in self._settings} - {step} | ({step} if skipped else set())

    def send(self, step: int, gradients: Sequence[OwnedGradient]) -> None:
        """Sends the updates of step `step`; returns at once. The gradients must not change until `flush` of the links."""
        for gradient in gradients:
            shard = self._optimizer.owned.shards[gradient.layer, gradient.interval.start]
            present = sum(1 << bit for bit, part in enumerate(gradient.parts) if part is not None)
            prefix = present.to_bytes(self._prefix(shard), "little")
            for holder in gradient.interval.replicas:
                self._links.send(holder, _tag(step, shard), prefix, gradient.memory)

    def replay(self, step: int) -> None:
        """Applies step `step` to every replica that has its update, after copying it aside: both steps can be sent from then on."""
        ready = [(r, r.received) for r in self._changing if r.received is not None and r.received.step == step and r.step is not None]
        still = [r for r in self.replicas if self._is_still(r) and r.step is not None and r.step < step]
        if not ready and not still:
            return
        self._copy_aside([*(replica for replica, _ in ready), *still])
        gradients = {(replica.shard.layer, replica.shard.interval.start): update.parts for replica, update in ready}
        if self._rest is not None:
            self._rest.forget("replica")
        if self._observer is not None:
            self._observer.replays()
        if gradients:
            self._optimizer.replay(gradients, self._settings[step], self._scales[step], skipped=step in self._skipped)
        for replica in (*(replica for replica, _ in ready), *still):
            replica.step, replica.received = step, None
        if self._observer is not None:
            self._observer.replayed(step)
        self.note()
        if self._observer is not None and self._rest is not None:
            self._observer.digested(step, self._rest.checksums_of("replica", step))

    def _copy_aside(self, replicas: Sequence[Replica]) -> None:
        """Makes the previous copies of replicas, in memory that is reused."""
        if self._observer is not None:
            self._observer.overwrites_previous_replicas()
        for replica in replicas:
            replica.previous = self._previous(replica)
        copies = [replica.previous for replica in replicas if replica.previous is not None]
        if self._rest is not None:
            self._rest.spared(copies, "replica", "previous replica")
        if self._observer is not None:
            self._observer.has_previous_replicas(copies[0].step, copies)

    def _previous(self, replica: Replica) -> Held:
        assert replica.step is not None  # only usable replicas are replayed
        if self._is_still(replica):
            return held(replica.shard, replica.step, "previous replica", {})
        shard, memory = replica.shard, dict(replica.previous.memory) if replica.previous is not None else {}
        for state, values in shard.memory.items():
            if state in memory:
                memory[state].copy_(values)
            else:
                memory[state] = lasting_copy(values)
        copied = held(shard, replica.step, "previous replica", self._optimizer.kept.scalars(shard))
        return replace(copied, memory=memory)

    def note(self, before: Rest | None = None) -> None:
        """Digests the replicas; digests of the view `before` are taken over where memory and step are the same."""
        for replica in self.replicas if self._rest is not None else ():
            if self._rest is not None and replica.step is not None:
                self._rest.note("replica", replica.shard.layer, replica.shard.interval.start, replica.step, replica.shard.memory, before)

    @property
    def step(self) -> int | None:
        """The step of the replicas; None if there are none."""
        return next((replica.step for replica in self._changing), None)

    def held(self, lost: Collection[int]) -> list[StoredCopy]:
        """Returns the copies that this worker can send: every replica, its previous copy, and its next step if the update has arrived.

        The next step is computed at once if the owner is among `lost`, else when it is first read.
        """
        found: list[StoredCopy] = []
        for replica in self.replicas:
            shard, update = replica.shard, replica.received
            if replica.previous is not None and replica.previous.step >= max(self._settings, default=-1) - 1:  # nobody needs older ones
                found.append(replica.previous)
            if replica.step is None:
                continue
            scalars = self._optimizer.kept.scalars(shard)
            found.append(held(shard, replica.step, "replica", scalars))
            if self._is_still(replica):
                found.append(held(shard, replica.step + 1, "replica", scalars))
            if update is None:
                continue
            skipped = update.step in self._skipped
            given = update.parts, self._settings[update.step], self._scales[update.step]
            make = functools.partial(self._optimizer.replayed, shard, scalars, *given, skipped=skipped)
            if shard.interval.owner in lost:
                newer = make()
                found.append(held(newer, update.step, "replica", newer.scalars))
            else:
                found.append(UnreplayedCopy(shard, update.step, make))
        return found

    def expect(self, step: int) -> None:
        """Posts the receive buffers for the updates of step `step`."""
        for replica in self._changing:
            replica.awaited = _tag(step, replica.shard)
            replica.sink.post(replica.shard.interval.owner, replica.awaited)

    def confirm(self) -> None:
        """Returns when every awaited update has arrived."""
        for replica in self.replicas:
            self._take(replica)

    def settle(self) -> None:
        """Takes the updates that have arrived, without waiting for others: the last call in a view."""
        for replica in self.replicas:
            if replica.awaited is not None and replica.sink.arrived():
                self._take(replica)

    def _take(self, replica: Replica) -> None:
        tag, shard = replica.awaited, replica.shard
        if tag is None:
            return
        memory, prefix = replica.sink.take(), self._prefix(shard)
        replica.awaited = None
        present = int.from_bytes(replica.sink.head(prefix).tobytes(), "little")
        gradient = retyped(memory[prefix:], shard.memory[PARAM].dtype)
        runs = enumerate(shard.parameters(self._spec))
        parts: Parts = [gradient[start:stop] if present >> bit & 1 else None for bit, (_, start, stop) in runs]
        replica.received = Update(step=tag.step, parts=parts)

    def give_up(self, damaged: Collection[CopyKey]) -> None:
        """Marks the replicas among these as unusable."""
        for replica in self.replicas:
            if ("replica", replica.shard.layer, replica.shard.interval.start) in damaged:
                replica.step = None
                if self._observer is not None:
                    self._observer.replays()  # if this worker dies too, its agent must not offer them

    def release(self) -> None:
        """Lets go of all memory."""
        self.replicas = []


def _tag(step: int, shard: Shard) -> Tag:
    return Tag(MessageKind.REPLICA, step, shard.layer, shard.interval.start)
