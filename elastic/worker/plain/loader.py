"""What `job.prepare` returns for the data: the loader that the plain loop iterates over."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from elastic.engine.after_step import AfterStep
from elastic.errors import TrainerError
from elastic.worker.plain import carried
from elastic.worker.plain.best import Best
from elastic.worker.plain.loop import Loop, Place
from elastic.worker.plain.passes import Passes
from elastic.worker.plain.refusals import check_schedulers
from elastic.worker.plain.trainer import PlainTrainer
from elastic.worker.report import Report

_log = logging.getLogger(__name__)


class Loader:
    """Micro-batches for the bodies of a plain loop. One pass over it is an epoch of the data, or all steps that were asked for.

    A body runs for each micro-batch that this worker has of a step. `report` is not None in the body that ended a step, behind its
    `optimizer.step()`: that is the place for what a loop does once a step. A pass that a worker has joined after is empty there.
    """

    def __init__(self, loop: Loop, passes: Passes, data: Any, *, batch_size: int, saves: bool) -> None:
        self._data, self._batch_size, self._saves = data, batch_size, saves
        self.loop = loop
        self._passes = passes
        self._next = 0  # the number of the pass that the next loop makes
        self._told: set[tuple[str, str, int]] = set()  # of variables that loops carry
        self._counts = 0  # calls of `epochs` that have begun
        self._before: list[Callable[[PlainTrainer], Any]] = []
        self.optimizers: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self.optimizers:
            check_schedulers(optimizer)
        number, self._next = self._next, self._next + 1
        return self._bodies(number)

    def _bodies(self, number: int) -> Iterator[Any]:
        if self.loop.warns:
            for warning in carried.told(sys._getframe(1), self._told):
                _log.warning(warning)
        if self.loop.built and isinstance(sys.exc_info()[1], StopIteration):
            # As in `except StopIteration: batch = next(iter(loader))`: whoever counts no passes gets one that is not over.
            number = self._passes.current(number, self.loop.taken)
            self._next = number + 1
        yield from self.loop.run(self._passes, number)

    def __len__(self) -> int:
        """The number of steps of the present pass, in its bodies; of the next one, elsewhere."""
        return self._passes.length(self._next if self.loop.place is Place.OUTSIDE else self._next - 1)

    @property
    def dataset(self) -> Any:
        """The dataset that `job.prepare` was given."""
        return self._data.dataset if isinstance(self._data, DataLoader) else self._data

    @property
    def batch_size(self) -> int:
        """The samples of an update, of all workers together."""
        return self._batch_size

    def __getattr__(self, name: str) -> Any:
        """Other attributes are those of the DataLoader that `job.prepare` was given, such as `num_workers`; its own may not be set."""
        data = self.__dict__.get("_data")
        if isinstance(data, DataLoader) and not name.startswith("_") and hasattr(data, name):
            return getattr(data, name)
        given = "" if data is None else f", and job.prepare was given a {type(data).__name__}"
        raise AttributeError(
            f"the loader that job.prepare returns has no attribute {name}{given}: ask the object that was given", name=name
        )

    def epochs(self, count: int) -> Iterator[int]:
        """Yields the numbers of `count` epochs, for a loop over the loader in each; without those that are over when this worker joins.

        The epochs that a checkpoint has are left out too; but if it ends with an epoch, that one comes, with an empty loop, since the
        checkpoint does not have what the code behind the loop does. Only number 0 always comes, since this worker joins in its loop. There
        are no more if the job stops. Each call counts from 0, and its epochs follow those that were there before.
        """
        counts, self._counts = self._counts, self._counts + 1
        first = self._passes.first_of(counts, self._next, self.loop.taken)
        for epoch in range(count):
            number = first + epoch
            if self.loop.stopped or number >= self._passes.over_at(counts):
                return
            if not self.loop.built or self.loop.taken < self._passes.end(number) or self.loop.resumed_at == self._passes.end(number):
                self._next = number
                yield epoch
        self._next = max(self._next, first + count)

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

    def keep_best(self, mode: str = "min") -> Best:
        """Before the loop: keeps the checkpoint of the best model, by the values that `update` of what it returns gets; see `Best`.

        `mode`: "min" if lower values are better, or "max". Raises TrainerError without `checkpoint=`, or after a step.
        """
        if not self._saves:
            raise TrainerError("loader.keep_best() has no directory to keep the best model in: give job.prepare checkpoint=")
        best = Best(mode, self.loop)
        self.register_for_checkpointing(best)
        self.keep_too(best.kept)
        return best

    def keep_too(self, chosen: Callable[[], Container[int]]) -> None:
        """For integrations. Before the loop: keeps the checkpoints of steps that `chosen` returns besides the newest ones.

        Another thread calls it.
        """
        self._early(lambda trainer: trainer.keep_too(chosen))

    def log(self, path: str | os.PathLike[str], **values: Any) -> None:
        """`Trainer.log`: appends a line of JSON exactly once, where `report` is not None. Every worker calls it."""
        if self.loop.report is None:
            raise TrainerError("loader.log() is called where loader.report is None, but a line belongs to a step: call it where it is not")
        self.loop.trainer("loader.log()").log(path, **values)
