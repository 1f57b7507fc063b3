"""A train function of a real job in which single bits of a worker's memory are flipped behind the runtime's back.

A flip is `[phase, step, what, state]`: when the worker enters the phase, one bit of `what` changes; `PLACES` lists what there is.
At "saving" the memory of a save has just been lent. At "arrival" the parameters of a layer have been gathered, and at "sent" updated
shards have been sent: they are not digested yet.
A flip `["random", step, seed, what, state]` happens at a random moment after that step has begun, from another thread.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

import elastic
from elastic.memory.raw import as_bytes
from elastic.snapshot.previous import PreviousCopies
from elastic.worker import engine
from tests.engine import models
from tests.recovery import running, trainings

CASES: dict[str, dict[str, Any]] = {
    **trainings.CASES,
    "adamw": {"model": models.blocks, "optimizer": models.adamw, "clip_norm": 0.5},
    "batchnorm": {"model": running.build, "optimizer": models.adamw},
}


def _owned(trainer: Any, state: str) -> list[torch.Tensor]:
    shards = trainer._engine._optimizer.owned.shards.values()
    return [shard.memory[state] for shard in shards if state in shard.memory]


def _replicas(trainer: Any, state: str) -> list[torch.Tensor]:
    return [replica.shard.memory[state] for replica in trainer._engine.replicator.replicas if state in replica.shard.memory]


def _gathered(trainer: Any, state: str) -> list[torch.Tensor]:
    held, worker = trainer._engine.view.layout.layers, trainer._job.worker
    runs = [(layer.layer, i) for layer in held if worker in layer.members for i in layer.intervals if i.owner != worker]
    found = [trainer._model.run(layer, interval.start, interval.stop) for layer, interval in runs]
    return found[:1] if state == "first" else found


def _sums(trainer: Any, state: str) -> list[torch.Tensor]:
    found = trainer._engine.executor.reducer.sums()
    return [part for nodes in found.values() for parts in nodes.values() for part in parts if part is not None]


def _boundaries(trainer: Any, state: str) -> list[torch.Tensor]:
    live = trainer._engine.executor._live.values()
    found = [each for flight in live for output in flight.outputs.values() for each in output.crossing.tensors if each is not None]
    return found[::-1]


def _scalars(trainer: Any, state: str) -> list[torch.Tensor]:
    states = trainer._engine._optimizer.optimizer.state.values()
    return [each[state] for each in states if isinstance(each.get(state), torch.Tensor)]


PLACES: dict[str, Callable[[Any, str], list[torch.Tensor]]] = {
    "live": _owned,
    "huge": lambda trainer, state: _owned(trainer, state)[:1],  # a bit of the exponent
    "previous": lambda trainer, state: [held.memory[state] for held in trainer._engine.previous_copies.held if state in held.memory],
    "replica": _replicas,
    "gathered": _gathered,
    "sum": _sums,
    "total": lambda trainer, state: [gradient.memory for gradient in trainer._engine._owned],
    "boundary": _boundaries,
    "scalar": _scalars,
    "running": lambda trainer, state: list(trainer._model.running.now().values()),
    "frozen": lambda trainer, state: [each.detach() for each in trainer._model.root.parameters() if not each.requires_grad],
}


def flip(where: torch.Tensor, element: int = 7, bit: int = 22) -> None:
    """Flips one bit of one element, unnoticed by torch."""
    raw = where.detach().reshape(-1).view(torch.uint8).numpy()
    raw[where.element_size() * (element % where.numel()) + bit // 8] ^= 1 << bit % 8


def strike(trainer: Any, what: str, state: str, generator: random.Random | None = None) -> bool:
    """Flips a bit, a random one of any tensor in that place if a generator is given; returns whether there was one."""
    found = [each for each in PLACES[what](trainer, state) if each.numel()]
    if not found:
        return False
    if generator is None:
        flip(found[-1], bit=30 if what == "huge" else 22)
    else:
        where = generator.choice(found)
        flip(where, generator.randrange(where.numel()), generator.randrange(8 * where.element_size()))
    return True


def train(job: Any, case: str, steps: int, flips: dict[str, list[list[Any]]], every: int = 1, saves: dict[str, Any] | None = None) -> Any:
    """`flips` by worker, in order. "kill" ends the worker. All layers are digested each step, or in so many."""
    engine.period = lambda view: every  # pyright: ignore[reportAttributeAccessIssue]
    options = {"data": models.Rows(), "loss": models.cross_entropy, "batch_size": 24, "micro_batch_size": 4, **CASES[case], **(saves or {})}
    build, loss, optimizer, data = (options.pop(part) for part in ("model", "loss", "optimizer", "data"))
    due = list(flips.get(str(job.worker), []))
    trainers: list[Any] = []
    done: list[bool] = []
    enter, job.phase_delay = job.enter, None

    def later(seed: int, what: str, state: str) -> None:
        generator = random.Random(seed)
        time.sleep(generator.random() * 0.03)
        done.append(strike(trainers[0], what, state, generator))

    def entered(phase: str, step: int, micro_batch: int = -1) -> None:
        if phase not in ("arrival", "sent", "saving"):
            enter(phase, step, micro_batch)
        if due and due[0][0] == "random" and step == due[0][1]:
            _, _, seed, what, state = due.pop(0)
            threading.Thread(target=later, args=(seed, what, state)).start()
        if due and due[0][:2] == [phase, step]:
            _, _, what, state = due.pop(0)
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "header":
                header = as_bytes(job.segment.header._page)
                for offset, bit in state:
                    header[offset] ^= 1 << bit
            else:
                done.append(strike(trainers[0], what, state))

    def before(method: str, phase: str) -> None:
        """Has the phase begin before each call of a method of the engine."""
        called = getattr(engine.Engine, method)

        def calling(self: Any, *arguments: Any) -> Any:
            if trainers and trainers[0]._runtime._engine is self:
                entered(phase, self.step)
            return called(self, *arguments)

        setattr(engine.Engine, method, calling)

    before("_gathered", "arrival")
    before("_note_owned", "sent")
    lend = PreviousCopies.lend

    def lending(copies: PreviousCopies) -> Callable[[], None]:
        entered("saving", copies.held[0].step)
        return lend(copies)

    PreviousCopies.lend = lending
    job.enter = entered
    torch.manual_seed(5)
    trainers.append(elastic.Trainer(build(), loss, optimizer, data, seed=11, **options))
    losses = [report.loss for report in trainers[0].run(steps)]
    told = trainers[0]._runtime.together(lambda: trainers[0]._engine.gather({"worker": job.worker, "flipped": sum(done)}))
    return {"digest": trainers[0].digest(), "losses": losses, "flipped": [each["flipped"] for each in told]}
