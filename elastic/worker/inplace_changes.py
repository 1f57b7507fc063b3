"""Refuses loop bodies, and code between loops, that change trained parameters or optimizer state in place: owners that join later would not
have the change, and it would be missing when a step is taken again. `trainer.after_step` makes such a change a part of the step.

`engine.unchanged` checks frozen parameters and buffers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from elastic.errors import TrainerError

Marks = tuple[list[tuple[int, int, bool]], list[int]]
"""Of each parameter its version, address and whether it is trained, and the versions of the optimizer's pieces and states."""


class InPlace:
    """Compares version counters before and after loop bodies, and between loops; changes through `.data` or NumPy are not detected."""

    def __init__(self, root: nn.Module, optimizer: Optimizer) -> None:
        self._root, self._optimizer = root, optimizer
        self._parameters = dict(root.named_parameters())
        self._trained = {name for name, parameter in self._parameters.items() if parameter.requires_grad}
        self._marks: Marks | None = None

    def watch(self) -> None:
        """Notes the present versions: nothing may change until `check`."""
        self._marks = self._now()

    @property
    def unchanged(self) -> bool:
        """Whether changes are watched, and nothing changed since `watch`."""
        return self._marks is not None and self._marks == self._now()

    @property
    def changed(self) -> bool:
        """Whether something changed since `watch`."""
        return self._marks is not None and self._marks != self._now()

    @property
    def values_changed(self) -> bool:
        """Whether values of trained parameters were written to since `watch`: not a mere move to another device or dtype."""
        if self._marks is None:
            return False
        return any(old[0] != new[0] for old, new in zip(self._marks[0], self._now()[0], strict=True))

    def check_names(self, step: int) -> None:
        """Raises TrainerError if the model has other parameters than in its first loop."""
        now = dict(self._root.named_parameters())
        for name in self._parameters.keys() | now.keys():
            if now.get(name) is not self._parameters.get(name):
                raise TrainerError(
                    f"parameter {name} of the model was replaced, added or removed after step {step}: what is trained is fixed when the "
                    "first loop begins. Build the model with all layers before it; to train a layer later, give its parameters a group of "
                    "their own, with learning rate and weight decay 0 until then"
                )

    def check(self, step: int) -> None:
        """Raises TrainerError if something changed since `watch`. Later changes are not watched."""
        before, self._marks = self._marks, None
        if before is None or (now := self._now()) == before:
            return
        what = "the optimizer's state"
        for name, old, new in zip(self._parameters, before[0], now[0], strict=True):
            if old != new:
                what = f"parameter {name}"
                if old[2] != new[2]:
                    raise TrainerError(
                        f"the loop body of step {step}, or code behind it, changed requires_grad of {what}: what is "
                        "trained is fixed when the first loop begins. To freeze it later, or to train it later, let "
                        "it require gradients from the beginning, in a parameter group of its own whose learning "
                        "rate and weight decay are 0 as long as it is frozen"
                    )
                break
        raise TrainerError(
            f"the loop body of step {step}, or code behind it, changed {what} in place: a step that is taken again "
            "after a loss, and workers that join, would lack the change. Make it in after_step(f) of the Trainer, or of the loader, as a "
            "part of the step (clamping, averages, teachers), or in a layer. model.load_state_dict is such a change: load weights before "
            "the first loop, and keep the best ones by state_dict() instead of putting them back"
        )

    def _now(self) -> Marks:
        trained = self._trained
        parameters = [
            (each._version, each.data_ptr(), each.requires_grad) if name in trained else (0, 0, each.requires_grad)
            for name, each in self._parameters.items()
        ]
        states = self._optimizer.state
        versions = [piece._version for piece in states]
        versions += [value._version for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)]
        return parameters, versions
