"""Where the initial values of trained parameters come from, if workers build the model without them."""

from __future__ import annotations

from typing import Protocol

import torch

from elastic.engine.deferred.recipe import Recipe
from elastic.memory import device


class InitialValues(Protocol):
    """Initial values by the parameter's name; they do not depend on the layout, or on which others are asked for."""

    def fill(self, name: str, start: int, run: torch.Tensor) -> None:
        """Fills flat memory with a parameter's values from element `start` on. Raises TrainerError if it has none."""
        ...

    def sample(self, name: str) -> torch.Tensor:
        """Returns a tensor like the parameter, for measuring: not necessarily with its values."""
        ...

    def digest(self, name: str) -> str | None:
        """Returns a digest of what a tensor's values follow from; None for a tensor whose values are in memory."""
        ...


class Computed:
    """Initial values as the functions that build the model give them."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def fill(self, name: str, start: int, run: torch.Tensor) -> None:
        if run.numel():
            run.copy_(self._recipe.value(name).reshape(-1)[start : start + run.numel()])

    def sample(self, name: str) -> torch.Tensor:
        return device.placed(self._recipe.value(name))

    def digest(self, name: str) -> str | None:
        return self._recipe.digest(name) if name in self._recipe else None
