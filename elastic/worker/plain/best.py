"""The best model that a plain loop has had so far: its checkpoint is kept, and loaded after the loop."""

from __future__ import annotations

import logging
from typing import Any

from elastic.errors import TrainerError
from elastic.worker.plain.loop import Loop

_MODES = ("min", "max")


_log = logging.getLogger(__name__)


class Best:
    """`loader.keep_best()` returns it. `value` is the best one so far, and `step` the number of steps of its checkpoint; None before.

    Checkpoints contain both, and workers that join get them.
    """

    def __init__(self, mode: str, loop: Loop) -> None:
        if mode not in _MODES:
            raise TrainerError(f"keep_best(mode={mode!r}): use 'min' if lower values are better, such as a loss, or 'max'")
        self.value: float | None = None
        self.step: int | None = None
        self._mode, self._loop = mode, loop
        self._before: int | None = None  # the best one until the present save has succeeded

    def update(self, value: Any) -> bool:
        """Saves a checkpoint if `value` is better than all before, and keeps it besides the newest ones. Returns whether it has.

        Every worker calls it with the same value, where `loader.report` is not None or behind a loop. NaN is never better. If the save
        fails, a warning says so, and the best model stays the one before.

        Raises:
            TrainerError: in the middle of a step, or for what is no number.
        """
        trainer = self._loop.trainer("best.update()")
        try:
            now = float(value)
        except (TypeError, ValueError) as error:
            raise TrainerError(f"best.update() got a {type(value).__name__}: give a number, such as the loss of held-out data") from error
        better = now == now and (self.value is None or (now < self.value if self._mode == "min" else now > self.value))
        before = self.value, self.step
        if better:
            self._before = self.step
            self.value, self.step = now, trainer.step
            trainer.save()
        saved = trainer.is_saved(asked=better)  # a worker that joins behind a loop is told what was found there
        self._before = None
        if better and not saved:
            self.value, self.step = before
            if trainer.leader:
                rest = (
                    "no best model is kept yet" if self.step is None else f"the best model that is kept is still that of {self.step} steps"
                )
                _log.warning("the state after %d steps, whose value %s is the best, could not be saved: %s", trainer.step, now, rest)
        return better and saved

    def load(self) -> None:
        """After the last loop: gives the model the parameters and buffers of the best checkpoint. Every worker calls it.

        Nothing can be trained or saved then: the job's own state stays that after the last step.

        Raises:
            TrainerError: in the middle of a step; or `update` was never called with a number.
            CheckpointError: the checkpoint is gone, or cannot be read here.
        """
        trainer = self._loop.trainer("best.load()")
        if self.step is None:
            raise TrainerError(
                "best.load() has nothing to load: call best.update(value) before, at least once, on every worker, with a number. If it was "
                "called, no save has succeeded, as warnings have said"
            )
        trainer.save()  # what a loop that was left early has trained
        trainer.show_saved(self.step)

    def kept(self) -> list[int]:
        """Returns the numbers of steps of the checkpoints to keep."""
        return [step for step in (self.step, self._before) if step is not None]

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step = state["value"], state["step"]
