"""Workers of one process that migrate between two layouts over loopback links, and the state expected at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from elastic.comm import LoopbackHub, LoopbackNetwork
from elastic.engine.model import LayeredModel
from elastic.engine.zero import ShardedOptimizer
from elastic.layout.layout import Layout, spread
from elastic.layout.transfer import PARAM
from elastic.recovery.inventory import Copy, Inventory
from elastic.recovery.proposal import Proposal, propose
from elastic.snapshot.held_copies import Held
from elastic.view import View
from elastic.worker.migration import Migration, Moved
from tests import dynamo  # noqa: F401
from tests.recovery.recovering import member, view_of

WIDTH, LAYERS, STEP = 160, 4, 7
STATES = ("exp_avg", "exp_avg_sq")


def model_of() -> LayeredModel:
    torch.manual_seed(1)
    return LayeredModel([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])


SPEC = model_of().spec


def truth() -> dict[tuple[str, int], torch.Tensor]:
    """By state and layer: what every coordinate should be. Zero in the padding."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for state in (PARAM, *STATES):
        for layer in SPEC.layers:
            found[state, layer.index] = flat = torch.zeros(layer.size)
            for parameter in layer.parameters:
                flat[parameter.start : parameter.stop].normal_(generator=generator)
    return found


TRUTH = truth()
SCALARS = {p.name: {"step": 8.0, **dict.fromkeys(STATES, "run")} for layer in SPEC.layers for p in layer.parameters}


def view(workers: Sequence[int], stages: int) -> View:
    """A committed one."""
    found = view_of(workers, layers=LAYERS, stages=stages)
    return dataclasses.replace(found, layout=spread(SPEC, [(stage.layers, stage.members) for stage in found.plan.stages]))


class Worker:
    """Has what it should hold under `layout` at STEP; nothing without one: it joins."""

    def __init__(self, worker: int, hub: LoopbackHub, layout: Layout | None = None) -> None:
        self.worker = worker
        self.model = model_of()
        self.optimizer = ShardedOptimizer(torch.optim.AdamW(self.model.root.parameters(), lr=1e-2), self.model)
        self.network = LoopbackNetwork(worker, hub)
        self.held: list[Held] = []
        if layout is not None:
            self._hold(layout)

    def _hold(self, layout: Layout) -> None:
        self.model.hold(layout.layers_of(self.worker))
        for layer, flat in self.model.flats.items():
            flat.copy_(TRUTH[PARAM, layer])
            self._add(layer, 0, flat.numel(), "gathered", {PARAM: flat})
        for layer in layout.layers:
            for i in layer.intervals:
                if self.worker not in (i.owner, *i.replicas):
                    continue
                memory = {state: TRUTH[state, layer.layer][i.start : i.stop].clone() for state in (PARAM, *STATES)}
                if i.owner == self.worker:
                    memory[PARAM] = self.model.run(layer.layer, i.start, i.stop)
                self._add(layer.layer, i.start, i.stop, "live" if i.owner == self.worker else "replica", memory)

    def _add(self, layer: int, start: int, stop: int, role: Any, memory: dict[str, torch.Tensor]) -> None:
        self.held.append(Held(layer=layer, start=start, stop=stop, step=STEP, role=role, memory=memory, scalars={}))

    @property
    def inventory(self) -> Inventory:
        copies = tuple(Copy(layer=h.layer, start=h.start, stop=h.stop, step=h.step, role=h.role) for h in self.held)
        scalars: dict[str, dict[str, Any]] = SCALARS
        return Inventory(worker=self.worker, yielded=STEP - 1, copies=copies, states=dict.fromkeys(STATES, "same"), scalars={STEP: scalars})

    def prepare(self, proposal: Proposal) -> Migration:
        scalars = {name: dict(values) for name, values in proposal.scalars.items()}
        return Migration(self.worker, proposal, self.held, scalars, self.model, self.optimizer, self.network, {})

    def contents(self) -> list[bytes]:
        """All bytes that it holds."""
        return [memory.numpy().tobytes() for held in self.held for memory in held.memory.values()]

    def check(self, migration: Migration, layout: Layout) -> None:
        """It has its place in the layout, as it should be."""
        assert set(self.model.flats) == set(layout.layers_of(self.worker))
        for layer, flat in self.model.flats.items():
            assert torch.equal(flat, TRUTH[PARAM, layer])
        wanted = [(layer.layer, i, i.owner) for layer in layout.layers for i in layer.intervals]
        owned = [(shard.layer, shard.interval) for shard in migration.state.owned]
        kept = [(shard.layer, shard.interval) for shard in migration.state.kept]
        assert owned == [(layer, i) for layer, i, owner in wanted if owner == self.worker]
        assert kept == [(layer, i) for layer, i, _ in wanted if self.worker in i.replicas]
        for shard in [*migration.state.owned, *migration.state.kept]:
            assert shard.memory.keys() == {PARAM, *STATES}
            for state, memory in shard.memory.items():
                assert torch.equal(memory, TRUTH[state, shard.layer][shard.interval.start : shard.interval.stop]), (self.worker, state)
            assert shard.scalars == {p.name: SCALARS[p.name] for p, _, _ in shard.parameters(SPEC)}
        for shard in migration.state.owned:
            flat = self.model.flats[shard.layer]
            assert shard.memory[PARAM].data_ptr() == flat[shard.interval.start :].data_ptr(), "owned parameters lie in the layer's vector"


class Job:
    """Workers of `last`; those who are lost have never existed, for they are not heard of any more."""

    def __init__(self, last: View, lost: Sequence[int] = (), joined: Sequence[int] = (), stages: int | None = None) -> None:
        hub = LoopbackHub()
        self.last, self.joined, self.stages = last, joined, stages
        self.workers = {worker: Worker(worker, hub, last.layout) for worker in last.workers if worker not in lost}
        self.survivors = dict(self.workers)
        self.workers.update({worker: Worker(worker, hub) for worker in joined})
        self.migrations: dict[int, Migration] = {}

    def propose(self, attempt: int = 1) -> Proposal:
        inventories = {number: worker.inventory for number, worker in self.survivors.items()}
        joiners = {worker: member(worker) for worker in self.joined}
        return propose(last=self.last, attempt=attempt, inventories=inventories, joiners=joiners, stages=self.stages)

    def prepare(self, proposal: Proposal) -> None:
        """Memory and links for all."""
        self.migrations = {number: worker.prepare(proposal) for number, worker in self.workers.items()}

    def migrate(self, proposal: Proposal, after: Callable[[int], object] = lambda worker: None) -> dict[int, Moved]:
        """Everybody at once; raises what the first one raises, when the others were called off."""
        self.prepare(proposal)
        view = proposal.view

        def run(number: int) -> Moved:
            migration = self.migrations[number]
            self.workers[number].network.install(view.epoch, view.attempt, view.members, migration.peers)
            try:
                moved = migration.run()
            except BaseException as error:
                for worker in self.workers.values():
                    worker.network.interrupt(error)
                raise
            after(number)
            return moved

        with ThreadPoolExecutor() as threads:
            running = {number: threads.submit(run, number) for number in self.workers}
        for worker in self.workers.values():
            worker.network.resume()
        return {number: future.result() for number, future in running.items()}

    def check(self, proposal: Proposal) -> None:
        for number, worker in self.workers.items():
            worker.check(self.migrations[number], proposal.view.layout)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.network.close()


def bytes_missing(worker: Worker, layout: Layout) -> int:
    """An oracle that goes element by element: what the worker needs under `layout` and does not hold."""
    total = 0
    for layer in layout.layers:
        size = SPEC.layers[layer.layer].size
        for state in (PARAM, *STATES):
            needed, had = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
            if state == PARAM and worker.worker in layer.members:
                needed[:] = True
            for i in layer.intervals:
                if worker.worker in (i.owner, *i.replicas):
                    needed[i.start : i.stop] = True
            for held in worker.held:
                if held.layer == layer.layer and state in held.memory:
                    had[held.start : held.stop] = True
            total += 4 * int(np.count_nonzero(needed & ~had))
    return total
