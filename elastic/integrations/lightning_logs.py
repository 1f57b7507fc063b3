"""What `training_step` logs by `self.log`: the loss of the whole step in the place of a micro-batch's.

A value that is the loss that `training_step` returns is known for the whole step. Others would be means over the micro-batches of one
worker: they are left out, with one warning. Which names are the loss is decided by the first micro-batch, which all workers try out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_log = logging.getLogger(__name__)

Logged = dict[str, tuple[Any, dict[str, Any]]]
"""Values and options by name."""


class StepLogs:
    """The names that are logged, and the sums of this epoch, as an object for `register_for_checkpointing`."""

    def __init__(self, trainer: Any, batch_size: int) -> None:
        self._trainer, self._batch_size = trainer, batch_size
        self._options: dict[str, dict[str, Any]] | None = None  # of the names that are the loss
        self._earlier: list[float] = []  # losses of this epoch that were logged elsewhere
        self._losses: list[float] = []  # those of this epoch
        self._epoch = 0

    @contextmanager
    def kept(self, module: Any) -> Iterator[Logged]:
        """Keeps what the module logs, instead of logging it."""
        logged: Logged = {}

        def log(name: str, value: Any, *given: Any, **options: Any) -> None:
            names = ("prog_bar", "logger", "on_step", "on_epoch")
            logged[name] = value, {**dict(zip(names, given, strict=False)), **options}

        object.__setattr__(module, "log", log)
        try:
            yield logged
        finally:
            object.__delattr__(module, "log")

    def learn(self, logged: Logged, loss: torch.Tensor) -> None:
        """Notes, from the first micro-batch, which of the values are the loss."""
        if self._options is not None:
            return
        own = {name: options for name, (value, options) in logged.items() if _is(value, loss)}
        self._options = own
        if others := [name for name in logged if name not in own]:
            _log.warning(
                "training_step logs %s, which the job leaves out: on each worker it would be a mean over other micro-batches. Log it in "
                "validation_step, where each worker has all of the data; the loss that training_step returns is logged for the whole step",
                ", ".join(others),
            )

    def log(self, module: Any, loss: torch.Tensor) -> None:
        """Logs the step's loss under all names."""
        self._note(loss.item())
        for name, options in (self._options or {}).items():
            known = {key: value for key, value in options.items() if key not in ("batch_size", "sync_dist", "rank_zero_only")}
            for earlier in self._earlier:
                module.log(name, torch.tensor(earlier), batch_size=self._batch_size, **known)
            module.log(name, loss, batch_size=self._batch_size, **known)
        self._earlier = []

    def _note(self, loss: float) -> None:
        if self._trainer.current_epoch != self._epoch:
            self._epoch, self._losses, self._earlier = self._trainer.current_epoch, [], []
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Returns the losses of this epoch."""
        return {"epoch": self._epoch, "losses": list(self._losses)}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Takes over such a state: the losses are logged once more before the next one, so that the epoch's mean has them."""
        self._epoch, self._losses = given["epoch"], list(given["losses"])
        self._earlier = list(self._losses)


def _is(value: Any, loss: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and bool(value.detach().reshape(()) == loss.detach().reshape(()))
