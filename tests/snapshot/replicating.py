"""Two workers in one process that own shards of one model and keep each other's replicas, over loopback links."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from elastic.comm import LoopbackHub, LoopbackNetwork
from elastic.engine.model import LayeredModel
from elastic.engine.reducer import OwnedGradient
from elastic.engine.shard import Shard
from elastic.engine.tensor_links import tensor_links
from elastic.engine.view_state import initial_state
from elastic.engine.zero import ShardedOptimizer
from elastic.layout.layout import spread
from elastic.snapshot.previous import PreviousCopies
from elastic.snapshot.replication import Replicator
from elastic.view import Member
from tests import dynamo  # noqa: F401

WIDTH = 96
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Doubling(torch.optim.SGD):
    """Writes to the gradients that it is given."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(2)
        return super().step(closure)


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "amsgrad, one by one": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True, foreach=False),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=0.1),
    "writes to gradients": lambda parameters: Doubling(parameters, lr=0.1, momentum=0.5),
}


class Worker:
    """One of the two workers. `gradients` are those of its last step, already scaled."""

    def __init__(self, worker: int, hub: LoopbackHub, make: Make) -> None:
        torch.manual_seed(1)
        model = LayeredModel([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH, bias=False)])
        self.spec = model.spec
        self.optimizer = ShardedOptimizer(make(list(model.root.parameters())), model)
        self.layout = spread(model.spec, [(range(2), (0, 1))])
        state = initial_state(worker, model, self.optimizer, SimpleNamespace(layout=self.layout))  # pyright: ignore[reportArgumentType]
        self.optimizer.owned.bind(state.owned)
        self.network = LoopbackNetwork(worker, hub)
        self.replicator = Replicator(worker, model.spec, tensor_links(self.network), self.optimizer, state.kept, -1)
        self.previous_copies = PreviousCopies(self.optimizer)

    @property
    def shards(self) -> list[Shard]:
        return list(self.optimizer.owned.shards.values())

    def gradients(self, step: int, absent: bool) -> list[OwnedGradient]:
        """Random ones, zero in the padding; with `absent` the last parameter of every shard that has several has none."""
        found = []
        for shard in self.shards:
            generator = torch.Generator().manual_seed(1000 * step + 10 * shard.layer + shard.interval.owner)
            memory = torch.zeros(shard.interval.elements)
            runs = shard.parameters(self.spec)
            parts: list[torch.Tensor | None] = [memory[start:stop].normal_(generator=generator) for _, start, stop in runs]
            if absent and len(parts) > 1:
                memory[slice(*runs[-1][1:])] = 0
                parts[-1] = None
            found.append(OwnedGradient(layer=shard.layer, interval=shard.interval, memory=memory, parts=parts))
        return found

    def update(self, step: int, *, absent: bool = False) -> list[OwnedGradient]:
        """As Engine.update."""
        for group in self.optimizer.optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        gradients = self.gradients(step, absent)
        self.replicator.begin(step)
        self.previous_copies.take(step - 1)
        self.optimizer.step(gradients, lambda gradient: gradient.mul_(0.5))
        return gradients

    def publish(self, step: int, gradients: list[OwnedGradient]) -> None:
        """As Engine.publish."""
        self.replicator.send(step, gradients)
        self.replicator.expect(step)

    def replay(self, step: int) -> None:
        """As before READY of the step behind this one."""
        self.replicator.confirm()
        self.replicator.replay(step)


class Pair:
    def __init__(self, make: Make) -> None:
        hub = LoopbackHub()
        self.workers = [Worker(number, hub, make) for number in range(2)]
        members = [Member(worker=number, host="here", address="") for number in range(2)]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda one: one.network.install(1, 0, members, [0, 1]), self.workers))

    def step(self, step: int, *, absent: bool = False) -> None:
        """Both take the step and have the other's update, which is not replayed yet."""
        self.send(step, absent=absent)
        for worker in self.workers:
            worker.replicator.confirm()

    def replay(self, step: int) -> None:
        for worker in self.workers:
            worker.replay(step)

    def send(self, step: int, *, absent: bool = False) -> None:
        """The same, without looking at what has come."""
        self.replay(step - 1)
        updates = [worker.update(step, absent=absent) for worker in self.workers]
        for worker, gradients in zip(self.workers, updates, strict=True):
            worker.publish(step, gradients)

    def close(self) -> None:
        for worker in self.workers:
            worker.network.close()


def copied(shards: list[Shard]) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """All memory by layer and start."""
    return {(s.layer, s.interval.start): {name: memory.clone() for name, memory in s.memory.items()} for s in shards}


def equal(ours: Any, theirs: Any) -> bool:
    """Whether two maps of state to memory have the same bits."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in ours)
