"""Several optimizers, and their schedulers, as one for the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from elastic.engine.probe import probe, second
from elastic.errors import TrainerError

_NUMBER = "optimizer"
"""The setting of a parameter group that says which of the optimizers it belongs to."""


class Optimizers(Optimizer):
    """Optimizers over different parameters, whose groups and states it shares. Its step is that of each, on what has a gradient."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__([{"params": []}], {})
        self._kinds = tuple(optimizers)
        self.param_groups = [group for each in optimizers for group in each.param_groups]
        self.state = defaultdict(dict, {parameter: state for each in optimizers for parameter, state in each.state.items()})
        for number, each in enumerate(optimizers):
            each.state = self.state
            for group in each.param_groups:
                group[_NUMBER] = number

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Steps a copy of each optimizer on its groups here: the engine has several objects like this one, over different tensors."""
        for number, kind in enumerate(self._kinds):
            own = second(kind)
            own.param_groups = [group for group in self.param_groups if group[_NUMBER] == number]
            own.state = self.state
            if own.param_groups:
                own.step()
            kind._opt_called = True  # pyright: ignore[reportAttributeAccessIssue] what schedulers look for


def as_one(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Returns the optimizer, or several as one that is named after their classes.

    Raises:
        TrainerError: if a parameter has two optimizers, or one of several cannot be spread over workers.
    """
    if len(optimizers) == 1:
        return optimizers[0]
    seen: dict[int, int] = {}
    for number, each in enumerate(optimizers):
        for parameter in parameters_of(each):
            if seen.setdefault(id(parameter), number) != number:
                raise TrainerError(
                    f"optimizers {seen[id(parameter)]} and {number} have a parameter in common, of shape {tuple(parameter.shape)}: give "
                    "each parameter one optimizer"
                )
        probe(each)
    kind = type("+".join(type(each).__name__ for each in optimizers), (Optimizers,), {})
    return kind(optimizers)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Returns the parameters in the optimizer's groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Schedulers:
    """Schedulers as one, for what is saved and sent to workers that join."""

    def __init__(self, schedulers: Sequence[Any], optimizer: Optimizer) -> None:
        self._schedulers, self.optimizer = schedulers, optimizer

    def state_dict(self) -> dict[str, Any]:
        return {str(number): each.state_dict() for number, each in enumerate(self._schedulers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, each in enumerate(self._schedulers):
            each.load_state_dict(state[str(number)])
