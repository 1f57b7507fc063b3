"""A worker that keeps its state in a segment as an engine does, with known values and without a model."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from elastic.engine.shard import Shard
from elastic.layout.layout import Interval
from elastic.layout.transfer import PARAM
from elastic.memory.raw import checksum
from elastic.memory.segment import OwnSegment
from elastic.memory.tensors import bytes_of, lasting
from elastic.plan.workload import LayerCost, Workload
from elastic.recovery.inventory import Inventory
from elastic.snapshot.held_copies import Held, held
from elastic.snapshot.previous import PreviousCopies
from elastic.worker.plain_state import to_plain
from elastic.worker.segment_contents import SegmentContents

LAYERS, SIZE = (0, 1), 256
STILL = 2
"""A layer that is not trained, of workers that have it."""
STATES = (PARAM, "exp_avg")


def states_of(layer: int, step: int) -> tuple[str, ...]:
    return STATES[:1] if layer == STILL or step < 0 else STATES


WORKLOAD = Workload(layers=(LayerCost(forward_s=1.0, backward_s=1.0, parameters=0, activation_bytes=0),), micro_batches=1, grains=1)


def truth(state: str, layer: int, step: int, start: int = 0, stop: int = SIZE) -> np.ndarray:
    """Returns what a run of a state is after a step."""
    step = 0 if layer == STILL else step
    return (np.arange(start, stop) * 0.25 + 1000 * (step + 2) + 300 * layer + 7777 * (state == PARAM)).astype(np.float32)


def buffers(step: int) -> np.ndarray:
    return np.full(300, step % 251 + 1, dtype=np.uint8)


def complete(states: Sequence[str], layer: int, step: int, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Returns memory with what these states of a run are after a step."""
    shard = Shard(layer=layer, interval=Interval(start=start, stop=stop, owner=7), memory={})
    fill(shard, step, states)
    return shard.memory


def fill(shard: Shard, step: int, states: Sequence[str] = STATES) -> None:
    """Updates a shard to a step, unless nothing changes it; states that it does not have are made."""
    if shard.layer == STILL and shard.memory:
        return
    start, stop = shard.interval.start, shard.interval.stop
    for state in states:
        if state not in shard.memory:
            shard.memory[state] = lasting(stop - start, torch.float32)
        shard.memory[state].copy_(torch.from_numpy(truth(state, shard.layer, step, start, stop)))


def checksums(shards: Mapping[tuple[int, int], Shard]) -> dict[tuple[int, int], Mapping[str, str]]:
    return {key: {state: checksum(bytes_of(memory)) for state, memory in shard.memory.items()} for key, shard in shards.items()}


@dataclass
class Worker:
    """Does to its memory what an engine does, in the same order. Shards and replicas are runs of two layers, and of a `still` one."""

    segment: OwnSegment
    choice: random.Random
    still: bool = False
    step: int = -1
    begun: int = 0
    retained: list[Held] = field(default_factory=list)
    lent: list[Any] = field(default_factory=list)
    before: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        counted = lambda shard: {f"{shard.layer}.w": {"step": float(self.counted)}}  # noqa: E731
        self.layers = (*LAYERS, STILL) if self.still else LAYERS
        self.owned: Any = SimpleNamespace(shards={}, still=frozenset({STILL}), scalars=counted)
        self.kept: Any = SimpleNamespace(shards={}, scalars=lambda shard: {f"{shard.layer}.w": {"step": float(self.replayed)}})
        self.model: Any = SimpleNamespace(flats={}, tied={}, state_dtypes=lambda: defaultdict(lambda: torch.float32))
        self.optimizer: Any = SimpleNamespace(owned=self.owned, kept=self.kept)
        self.counted = self.replayed = self.step
        self.contents = SegmentContents(7, self.segment, self.model, self.optimizer)
        self.previous = PreviousCopies(self.optimizer, self.contents)
        self.enter_view(-1)

    def enter_view(self, step: int) -> None:
        """Begins a view that resumes at a step, with another place; the old copies are kept for two steps."""
        scalars = self.owned.scalars
        old = [held(shard, self.step, "live", scalars(shard)) for shard in self.owned.shards.values()] + self.previous.held
        old += [held(shard, self.replayed, "replica", self.kept.scalars(shard)) for shard in self.kept.shards.values()] + self.before
        if self.begun:
            for layer, flat in self.model.flats.items():
                where = {"layer": layer, "start": 0, "stop": SIZE, "step": self.step, "scalars": {}}
                old.append(Held(role="gathered", memory={PARAM: flat}, **where))
        flats, shards, kept = {}, {}, {}
        for layer in self.layers:
            flats[layer] = lasting(SIZE, torch.float32)
            flats[layer].copy_(torch.from_numpy(truth(PARAM, layer, step)))
            cuts = sorted({0, SIZE, *self.choice.sample(range(64, SIZE, 64), self.choice.randrange(3))})
            for start, stop in pairwise(cuts):
                if self.choice.random() < 0.7 or (layer, start) == (0, 0):
                    interval = Interval(start=start, stop=stop, owner=7)
                    memory = {PARAM: flats[layer][start:stop], **complete(states_of(layer, step)[1:], layer, step, start, stop)}
                    shards[layer, start] = Shard(layer=layer, interval=interval, memory=memory)
                elif self.choice.random() < 0.7:
                    interval = Interval(start=start, stop=stop, owner=8, replicas=(7,))
                    memory = complete(states_of(layer, step), layer, step, start, stop)
                    kept[layer, start] = Shard(layer=layer, interval=interval, memory=memory)
        self.contents.prepared(
            step, [*shards.values()], [*kept.values()], {f"{layer}.w": to_plain({"step": float(step)}) for layer in self.layers}
        )
        self.owned.shards, self.model.flats, self.step, self.counted = shards, flats, step, step
        self.kept.shards, self.replayed, self.before = kept, step, []
        self.previous = PreviousCopies(self.optimizer, self.contents)
        self.retained, self.begun = [copy for copy in old if copy.step == step], step
        self.contents.has_buffers(step, buffers(step))
        self.contents.begin(step, self.retained, {**self.digests(), **checksums(kept)}, WORKLOAD)
        self.note_loop()

    def digests(self) -> dict[tuple[int, int], Mapping[str, str]]:
        return checksums(self.owned.shards)

    def note_loop(self) -> None:
        self.contents.loop(lambda: Inventory(worker=7, yielded=self.step, copies=()))

    def replay(self) -> None:
        """Brings the replicas to the newest step, as before READY of the next one."""
        step, shards = self.step, [*self.kept.shards.values()]
        if not shards or self.replayed == step:
            return
        self.contents.overwrites_previous_replicas()
        known = {(copy.layer, copy.start): copy.memory for copy in self.before}
        self.before = []
        for shard in shards:
            memory = dict(known.get((shard.layer, shard.interval.start), {}))
            if shard.layer == STILL:
                memory = shard.memory
            for state, values in shard.memory.items() if shard.layer != STILL else ():
                memory[state] = memory.get(state, lasting(values.numel(), torch.float32)).copy_(values)
            copied = held(shard, self.replayed, "previous replica", self.kept.scalars(shard))
            self.before.append(replace(copied, memory=memory))
        self.contents.has_previous_replicas(self.replayed, self.before)
        self.contents.replays()
        for shard in shards:
            fill(shard, step)
        self.replayed = step
        self.contents.replayed(step)
        if self.choice.random() < 0.8:
            self.contents.digested(step, checksums(self.kept.shards))

    def take_step(self, *, digested: bool) -> None:
        self.replay()
        if self.step >= self.begun + 1 and self.retained:
            self.contents.retain_nothing()
            self.retained = []
        self.previous.take(self.step)
        self.contents.updates()
        step = self.step + 1
        for shard in self.owned.shards.values():
            fill(shard, step)
        self.counted = step
        self.contents.has_buffers(step, buffers(step))
        self.contents.updated(step)
        self.step = step
        self.note_loop()
        for layer, flat in self.model.flats.items():
            if layer == STILL:
                continue
            flat.copy_(torch.from_numpy(truth(PARAM, layer, step)))
        if digested:
            self.contents.digested(step, self.digests())

    def save(self) -> None:
        """After READY of the next step."""
        self.replay()
        self.previous.take(self.step)
        self.lent.append(self.previous.lend())

    def saved(self) -> None:
        if self.lent:
            self.lent.pop(0)()

    def act(self, what: str) -> None:
        if what == "step":
            self.take_step(digested=True)
        elif what == "step without digests":
            self.take_step(digested=False)
        elif what == "save" and not self.lent:
            self.save()
        elif what == "saved":
            self.saved()
        elif what == "view":
            self.enter_view(self.step)
        elif what == "view, one step back" and self.previous.held:
            self.enter_view(self.previous.held[0].step)
