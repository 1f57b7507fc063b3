"""The Trainer behind a plain loop: its one layer is the loop's body."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, NoReturn

import torch

from elastic.engine import after_step as after
from elastic.engine.after_step import AfterStep
from elastic.engine.decision import Apply
from elastic.engine.profile import LayerProfile
from elastic.errors import TrainerError
from elastic.worker.likeness import Likeness
from elastic.worker.plain.body import Body
from elastic.worker.plain.source import Stream
from elastic.worker.restore import persistent_buffers
from elastic.worker.trainer import Trainer


def _the_body(output: Any, micro_batch: Any) -> Any:
    """The loss of a micro-batch, which the body has computed; with its weight, if it has given one."""
    loss, weight = output
    return loss if weight is None else (loss, weight)


class PlainTrainer(Trainer):
    """A Trainer whose layer's cost was `measured` by the loop, and whose scheduler is stepped by it.

    `clip_norms` has the norm to clip to of each update that the loop's body makes, in turn.
    """

    def __init__(
        self, body: Body, optimizer: Any, stream: Stream, measured: LayerProfile, clip_norms: Sequence[float | None], **options: Any
    ) -> None:
        self._by_trial = measured
        self._updates = len(clip_norms)
        self._norms = tuple(clip_norms)
        self._shows = False  # whether the model has been given the parameters of a checkpoint
        if options.get("every") is not None:
            options["every"] *= self._updates
        super().__init__(body, _the_body, optimizer, stream, **options)

    def _measured(self) -> LayerProfile:
        return self._by_trial

    def _step_scheduler(self, _: Apply) -> None:
        pass

    def compare(self, sample: Callable[[int], str | None]) -> None:
        """Has what `sample` returns for a step compared between workers now and then, for each update: see `elastic.worker.likeness`."""
        self._runtime.likeness = Likeness(sample, self._updates, proven=not self._job.joins)

    def begin_pass(self) -> None:
        """Notes that a pass over the data begins. Raises TrainerError if the model has the parameters of another step."""
        self.check_shown()
        if self._runtime.likeness is not None:
            self._runtime.likeness.begin(self.step // self._updates)

    def check_shown(self) -> None:
        """Raises TrainerError if the model has been given the parameters of a checkpoint."""
        if self._shows:
            raise TrainerError(
                "a loop over the loader begins, or goes on, after best.load(): the job's own parameters are those of its last step, so "
                "nothing can be trained from the best ones. Load them after the last loop, or give their checkpoint to a job of its own"
            )

    @property
    def handed_out(self) -> int:
        """The number of steps taken so far, without a last one whose loop body is still to run here: that belongs to its own pass."""
        return self.step - (self._runtime.unseen is not None)

    def complete(self) -> None:
        """Waits until the step that was handed out is complete everywhere: its body is not to be interrupted by steps taken again."""
        self._runtime.complete()
        self._runtime.at("body", self._history.step)

    @property
    def keys_all(self) -> bool:
        """Whether steps key Python's and NumPy's generators too."""
        return self._engine.executor.generators.all_keyed

    def unrecorded(self) -> AbstractContextManager[None]:
        """Returns a context in which forwards change no running statistics."""
        return self._model.running.statistics.during(0, None)

    def unrecorded_amid(self) -> AbstractContextManager[None]:
        """Returns the same for a part of a forward that is recorded."""
        return self._model.running.statistics.unkept()

    def log(self, path: str | os.PathLike[str], **values: Any) -> None:
        self._job.send(self._numbers.record(path, self._runtime.handed // self._updates, values))

    def after_step(self, f: AfterStep) -> AfterStep:
        """`Trainer.after_step`. If the loop's body makes several updates, f acts behind each on the parameters that it has changed."""
        if self._updates == 1:
            return super().after_step(f)
        after.check(f, self._model.dtype(self._model.vectors[0].home), self._model.spec.cut)

        @wraps(f)
        def changed(parameter: torch.Tensor, state: dict[str, Any]) -> Any:
            return f(parameter, state) if parameter.grad is not None else None

        self._optimizer.after.append(changed)
        self._history.after.append(after.name_of(f))
        return f

    def keep_too(self, chosen: Callable[[], Container[int]]) -> None:
        """Keeps the checkpoints of steps that `chosen` returns, besides the newest ones."""
        if self._checkpoints is not None:
            self._checkpoints.keep_too(chosen)

    def is_saved(self, *, asked: bool) -> bool:
        """Returns whether there is a checkpoint of the newest step, as the leader finds it; False if not `asked`. Every worker calls it."""

        def found() -> bool:
            return asked and self.leader and self._checkpoints is not None and self._checkpoints.has(self.step)

        saved = any(each["saved"] for each in self._steps.together(lambda: self._engine.gather({"saved": found()})))
        if not saved:
            self._steps.is_not_saved()
        return saved

    def show_saved(self, step: int) -> None:
        """Gives the model the parameters and buffers of the checkpoint of `step` steps, after the training, in memory of their own.

        The job keeps those after its last step: for workers that join now, and for checkpoints. So nothing may be trained or saved then.

        Raises:
            CheckpointError: there is no such checkpoint, or it cannot be read here. The model is as before.
            TrainerError: nothing is saved.
        """
        if self._checkpoints is None:
            raise TrainerError("show_saved() has no directory to read from: give job.prepare checkpoint=")
        saved, model = self._checkpoints.saved(step), self._model
        for name, tensor in [*((name, model.parameter(name)) for name in model.names), *persistent_buffers(model.root)]:
            tensor.data = saved[name].to(tensor.device, tensor.dtype)
        self._shows = True
        self._runtime.ended()  # no change by the user's code

    def state_dict(self, state: str | None = None) -> dict[str, torch.Tensor]:
        return super().state_dict(state) if state is not None or not self._shows else self._model.state_dict({})

    def evaluate(self, dataset: Any, *, micro_batches: int | None = None) -> NoReturn:
        raise TrainerError(
            "evaluate() needs a loss that the runtime knows, and here it is in the loop's body: evaluate by a loop of your own, under "
            "torch.no_grad(), on every worker where loader.report is not None"
        )
