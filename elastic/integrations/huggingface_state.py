"""What a transformers `Trainer` remembers from step to step: sent to workers that join, saved, and compared between workers."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_callback import ExportableState

_BEST = ("best_metric", "best_global_step", "best_model_checkpoint")
_LOGS = 200
"""Newest entries of the log history that are sent: all states together have a limit."""
_TIMES = ("_runtime", "_per_second", "_preparation_time")


class LoopState:
    """The state of a Trainer's loop, as an object for `register_for_checkpointing`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums of losses, the best metric, the newest logs without times, and the states of callbacks that export one."""
        trainer, state = self._trainer, self._trainer.state
        best = {name: getattr(state, name) for name in _BEST}
        return {
            **best,
            "loss": trainer._tr_loss.item(),
            "total_loss": float(trainer._total_loss_scalar),
            "logged": trainer._globalstep_last_logged,
            "logs": [_timeless(entry) for entry in state.log_history[-_LOGS:]],
            "callbacks": [callback.state()["attributes"] for callback in self._callbacks()],
        }

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Takes over such a state."""
        trainer, state = self._trainer, self._trainer.state
        for name in _BEST:
            setattr(state, name, given[name])
        trainer._tr_loss = torch.tensor(given["loss"], device=trainer.args.device)
        trainer._total_loss_scalar, trainer._globalstep_last_logged = given["total_loss"], given["logged"]
        state.log_history = list(given["logs"])
        for callback, attributes in zip(self._callbacks(), given["callbacks"], strict=True):
            for name, value in attributes.items():
                setattr(callback, name, value)

    def _callbacks(self) -> list[Any]:
        return [each for each in self._trainer.callback_handler.callbacks if isinstance(each, ExportableState)]


def _timeless(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith(_TIMES)}
