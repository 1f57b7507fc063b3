"""Replicas of owned state in another worker's memory, kept up to date by *replay*.

After every update the owner sends the gradient that it applied to the holder of the shard's replica: a third of the bytes of AdamW's state.
The holder keeps the replica at the previous step and the gradient, so it can send either step; when the step is committed, it applies the
same update to its copy. The link verifies what arrives. A worker sends READY for the next step only when its updates have arrived, so a
step's replicas are complete before the next step is applied anywhere. Digests of both copies are compared with READY (`comparison`).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic.comm.endpoint import Endpoint
from elastic.comm.message import MessageKind, Tag
from elastic.engine.reducer import OwnedGradient
from elastic.engine.reduction import Parts
from elastic.engine.shard import Shard
from elastic.engine.zero import ShardedOptimizer
from elastic.layout.regions import ModelSpec
from elastic.layout.transfer import PARAM
from elastic.memory.tensors import Landing, bytes_of, empty, retyped
from elastic.snapshot.held_copies import StoredCopy, UnreplayedCopy, held
from elastic.snapshot.rest_digests import CopyKey, Rest

_ALIGN = 64


@dataclass(slots=True, kw_only=True)
class Replica:
    """A shard kept for its owner, at step `step` (None: unusable, since it is damaged).

    `received` is the next update, if it has arrived.
    """

    shard: Shard
    step: int | None
    landing: Landing  # uint8, receives the owner's next message
    awaited: Tag | None = None
    received: Update | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One step's gradient of a shard, None where a parameter had none."""

    step: int
    parts: Parts


class Replicator:
    """Replicates one worker's shards in one view: sends updates of those it owns, and keeps replicas of other workers'."""

    def __init__(
        self,
        worker: int,
        spec: ModelSpec,
        network: Endpoint,
        optimizer: ShardedOptimizer,
        kept: Sequence[Shard],
        step: int,
        rest: Rest | None = None,
    ) -> None:
        self._rest = rest
        self._worker, self._spec, self._network, self._optimizer = worker, spec, network, optimizer
        optimizer.kept.bind(kept)
        self.replicas = [Replica(shard=shard, step=step, landing=self._room(shard)) for shard in kept]
        self._settings: dict[int, list[dict[str, Any]]] = {}
        self._skipped: set[int] = set()

    def _room(self, shard: Shard) -> Landing:
        return Landing(empty(self._prefix(shard) + shard.memory[PARAM].nbytes, torch.uint8))

    def _prefix(self, shard: Shard) -> int:
        return -(-len(shard.parameters(self._spec)) // (8 * _ALIGN)) * _ALIGN

    @property
    def peers(self) -> set[int]:
        """The workers that hold this worker's replicas, and those whose replicas it holds."""
        holders = {shard.interval.replica for shard in self._optimizer.owned.shards.values()}
        owners = {replica.shard.interval.owner for replica in self.replicas}
        return {peer for peer in holders | owners if peer is not None} - {self._worker}

    @property
    def state_bytes(self) -> int:
        """Memory of the replicas."""
        return sum(memory.nbytes for replica in self.replicas for memory in replica.shard.memory.values())

    @property
    def update_bytes(self) -> int:
        """Memory that receives the owners' updates."""
        return sum(replica.landing.size for replica in self.replicas)

    def begin(self, step: int, *, skipped: bool = False) -> None:
        """Stores the optimizer's settings before its step, and whether the step is skipped."""
        self._settings = {known: settings for known, settings in self._settings.items() if known >= step - 1}
        self._settings[step] = self._optimizer.settings()
        self._skipped = {known for known in self._skipped if known in self._settings} - {step} | ({step} if skipped else set())

    def send(self, step: int, gradients: Sequence[OwnedGradient]) -> None:
        """Sends the updates of step `step`; returns at once. The gradients must not change until `flush` of the network."""
        for gradient in gradients:
            holder = gradient.interval.replica
            if holder is None:
                continue
            shard = self._optimizer.owned.shards[gradient.layer, gradient.interval.start]
            present = sum(1 << bit for bit, part in enumerate(gradient.parts) if part is not None)
            self._network.send(holder, _tag(step, shard), present.to_bytes(self._prefix(shard), "little"), bytes_of(gradient.memory))

    def replay(self, step: int) -> None:
        """Applies the committed step `step` to every replica that has its update."""
        ready = [(r, r.received) for r in self.replicas if r.received is not None and r.received.step == step]
        if not ready:
            return
        gradients = {(replica.shard.layer, replica.shard.interval.start): update.parts for replica, update in ready}
        if self._rest is not None:
            self._rest.forget("replica")
        self._optimizer.replay(gradients, self._settings[step], skipped=step in self._skipped)
        for replica, _ in ready:
            replica.step, replica.received = step, None
        self.note()

    def note(self, before: Rest | None = None) -> None:
        """Digests the replicas; digests of the view `before` are taken over where memory and step are the same."""
        for replica in self.replicas if self._rest is not None else ():
            if self._rest is not None and replica.step is not None:
                self._rest.note("replica", replica.shard.layer, replica.shard.interval.start, replica.step, replica.shard.memory, before)

    @property
    def step(self) -> int | None:
        """The step of the replicas; None if there are none."""
        return next((replica.step for replica in self.replicas), None)

    def held(self, lost: Collection[int]) -> list[StoredCopy]:
        """Returns the copies that this worker can send: every replica, and its next step if the update has arrived.

        The next step is computed at once if the owner is among `lost`, else when it is first read.
        """
        found: list[StoredCopy] = []
        for replica in self.replicas:
            shard, update = replica.shard, replica.received
            if replica.step is None:
                continue
            scalars = self._optimizer.kept.scalars(shard)
            found.append(held(shard, replica.step, "replica", scalars))
            if update is None:
                continue
            skipped = update.step in self._skipped
            make = functools.partial(self._optimizer.replayed, shard, scalars, update.parts, self._settings[update.step], skipped=skipped)
            if shard.interval.owner in lost:
                newer = make()
                found.append(held(newer, update.step, "replica", newer.scalars))
            else:
                found.append(UnreplayedCopy(shard, update.step, make))
        return found

    def expect(self, step: int) -> None:
        """Posts the receive buffers for the updates of step `step`."""
        for replica in self.replicas:
            replica.awaited = _tag(step, replica.shard)
            self._network.post(replica.shard.interval.owner, replica.awaited, replica.landing.bytes)

    def confirm(self) -> None:
        """Returns when every awaited update has arrived."""
        for replica in self.replicas:
            self._take(replica)

    def settle(self) -> None:
        """Takes the updates that have arrived, without waiting for others: the last call in a view."""
        for replica in self.replicas:
            if replica.awaited is not None and self._network.arrived(replica.shard.interval.owner, replica.awaited):
                self._take(replica)

    def _take(self, replica: Replica) -> None:
        tag, shard = replica.awaited, replica.shard
        if tag is None:
            return
        self._network.receive(shard.interval.owner, tag)
        replica.awaited = None
        prefix = self._prefix(shard)
        memory = replica.landing.take()
        present = int.from_bytes(bytes_of(memory[:prefix]).tobytes(), "little")
        gradient = retyped(memory[prefix:], shard.memory[PARAM].dtype)
        runs = enumerate(shard.parameters(self._spec))
        parts: Parts = [gradient[start:stop] if present >> bit & 1 else None for bit, (_, start, stop) in runs]
        replica.received = Update(step=tag.step, parts=parts)

    def give_up(self, damaged: Collection[CopyKey]) -> None:
        """Marks the replicas among these as unusable."""
        for replica in self.replicas:
            if ("replica", replica.shard.layer, replica.shard.interval.start) in damaged:
                replica.step = None


def _tag(step: int, shard: Shard) -> Tag:
    return Tag(MessageKind.REPLICA, step, shard.layer, shard.interval.start)
