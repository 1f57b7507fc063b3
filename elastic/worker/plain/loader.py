"""What `job.prepare` returns for the data: the loader that the plain loop iterates over."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch

from elastic.engine.after_step import AfterStep
from elastic.errors import TrainerError
from elastic.worker.plain.loop import Loop, Place
from elastic.worker.plain.passes import Passes
from elastic.worker.plain.refusals import check_schedulers
from elastic.worker.plain.trainer import PlainTrainer
from elastic.worker.report import Report


class Loader:
    """Micro-batches for the bodies of a plain loop. One pass over it is an epoch of the data, or all steps that were asked for.

    A body runs for each micro-batch that this worker has of a step. `report` is not None in the body that ended a step, behind its
    `optimizer.step()`: that is the place for what a loop does once a step. A pass that a worker has joined after is empty there.
    """

    def __init__(self, loop: Loop, passes: Passes) -> None:
        self.loop = loop
        self._passes = passes
        self._next = 0  # the number of the pass that the next loop makes
        self._before: list[Callable[[PlainTrainer], Any]] = []
        self.optimizers: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self.optimizers:
            check_schedulers(optimizer)
        number, self._next = self._next, self._next + 1
        return self.loop.run(self._passes, number)

    def __len__(self) -> int:
        """The number of steps of the present pass, in its bodies; of the next one, elsewhere."""
        return self._passes.length(self._next if self.loop.place is Place.OUTSIDE else self._next - 1)

    def epochs(self, count: int) -> Iterator[int]:
        """Yields the numbers of `count` epochs, for a loop over the loader in each; without those that are over when this worker joins.

        The epochs that a checkpoint has are left out too; but if it ends with an epoch, that one comes, with an empty loop, since the
        checkpoint does not have what the code behind the loop does. Only number 0 always comes, since this worker joins in its loop. There
        are no more if the job stops.
        """
        for number in range(count):
            if self.loop.stopped:
                return
            if number == 0 or self.loop.taken < self._passes.end(number) or self.loop.resumed_at == self._passes.end(number):
                self._next = number
                yield number

    @property
    def report(self) -> Report | None:
        """The report of the step that the body has ended, behind its `optimizer.step()`; None everywhere else."""
        return self.loop.report

    def made(self, trainer: PlainTrainer) -> PlainTrainer:
        """Makes the calls that came before the Trainer was there."""
        for call in self._before:
            call(trainer)
        return trainer

    def _early(self, call: Callable[[PlainTrainer], Any]) -> None:
        if self.loop.built:
            call(self.loop.trainer("this"))
        else:
            self._before.append(call)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """`Trainer.register_for_checkpointing`, before the loop: objects that the body changes, where `report` is not None."""
        self._early(lambda trainer: trainer.register_for_checkpointing(*objects))

    def after_step(self, f: AfterStep) -> AfterStep:
        """`Trainer.after_step`, before the loop: a change of parameters after each update, as a part of the step."""
        self._early(lambda trainer: trainer.after_step(f))
        return f

    def average(self, decay: float) -> None:
        """`Trainer.average`, before the loop: keeps a moving average of the parameters."""
        self._early(lambda trainer: trainer.average(decay))

    def digest(self) -> str:
        """`Trainer.digest`: the hex SHA-256 of all parameters and buffers. Every worker calls it, and gets it."""
        return self.loop.trainer("loader.digest()").digest()

    def state_dict(self, state: str | None = None) -> dict[str, torch.Tensor]:
        """`Trainer.state_dict`: the model's, or with `state` one with that state, such as "average". Every worker calls it."""
        return self.loop.trainer("loader.state_dict()").state_dict(state)

    def statistics(self) -> list[dict[str, Any]] | None:
        """`Trainer.statistics`: of each worker, on the leader. Every worker calls it."""
        return self.loop.trainer("loader.statistics()").statistics()

    def save(self) -> None:
        """`Trainer.save`: saves at once. Every worker calls it."""
        self.loop.trainer("loader.save()").save()

    def keep_too(self, chosen: Callable[[], Container[int]]) -> None:
        """Before the loop: keeps the checkpoints of steps that `chosen` returns, besides the newest ones. Another thread calls it."""
        self._early(lambda trainer: trainer.keep_too(chosen))

    def show_saved(self, step: int) -> None:
        """After the loop: gives the model the parameters and buffers of the checkpoint of `step` steps. Nothing can be trained then.

        Raises CheckpointError: there is no such checkpoint, or it cannot be read here.
        """
        self.loop.trainer("loader.show_saved()").show_saved(step)

    def log(self, path: str | os.PathLike[str], **values: Any) -> None:
        """`Trainer.log`: appends a line of JSON exactly once, where `report` is not None. Every worker calls it."""
        if self.loop.report is None:
            raise TrainerError("loader.log() is called where loader.report is None, but a line belongs to a step: call it where it is not")
        self.loop.trainer("loader.log()").log(path, **values)
