"""Brings the loop of a Lightning Trainer to the job's step, in a worker that joins or a job that continues, with the callbacks' states."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Checkpoint

_ALL = ("ready", "started", "processed", "completed")


class CallbackStates:
    """The state of one callback, as an object for `register_for_checkpointing`."""

    def __init__(self, callback: Any) -> None:
        self._callback = callback

    @classmethod
    def of(cls, trainer: Any) -> list[CallbackStates]:
        """Those of all callbacks that have a state; of ModelCheckpoint none, since it has paths of one worker."""
        found = [each for each in trainer.callbacks if not isinstance(each, Checkpoint) and each.state_dict()]
        return [cls(each) for each in found]

    def state_dict(self) -> dict[str, Any]:
        """Returns the callback's."""
        return self._callback.state_dict()

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Gives it back."""
        self._callback.load_state_dict(given)


def fast_forward(trainer: Any, taken: int, per_epoch: int) -> None:
    """Sets the counters of the loop as if this worker had taken those steps. Called before the first epoch begins."""
    if not taken:
        return
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    over, rest = divmod(taken, per_epoch)
    _set(fit.epoch_progress.total, over)
    _set(fit.epoch_progress.current, over)
    reset = loop.reset

    def reset_once() -> None:
        del loop.reset
        reset()
        for progress in (loop.batch_progress, loop.automatic_optimization.optim_progress.optimizer.step):
            _set(progress.total, taken)
            _set(progress.current, rest)
        loop._batches_that_stepped = taken

    loop.reset = reset_once
    _set(loop.automatic_optimization.optim_progress.optimizer.step.total, taken)  # trainer.global_step, asked for before


def _set(tracker: Any, count: int) -> None:
    for name in _ALL:
        if hasattr(tracker, name):
            setattr(tracker, name, count)
