"""Where the initial values of trained parameters come from, if workers build the model without them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from elastic.engine.deferred.recipe import Recipe
from elastic.memory import device
from elastic.memory.tensors import address


class InitialValues(Protocol):
    """Initial values by the parameter's name; they do not depend on the layout, or on which others are asked for."""

    def fill(self, name: str, start: int, run: torch.Tensor) -> None:
        """Fills flat memory with a parameter's values from element `start` on. Raises TrainerError if it has none."""
        ...

    def value(self, name: str) -> torch.Tensor:
        """Returns a whole tensor, where layers compute: one that every worker has. Raises TrainerError if it has no value."""
        ...

    def sample(self, name: str) -> torch.Tensor:
        """Returns a tensor like the parameter, for measuring: not necessarily with its values."""
        ...

    def digest(self, name: str) -> str | None:
        """Returns a digest of what a tensor's values follow from; None for a tensor whose values are in memory."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes that were read of files here."""
        ...

    def close(self) -> None:
        """Lets go of open files. They are opened again when they are needed."""


class Computed:
    """Initial values as the functions that build the model give them."""

    bytes_read = 0

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def fill(self, name: str, start: int, run: torch.Tensor) -> None:
        shape, _ = self._recipe.form(name)
        whole = run.is_cpu and run.numel() == math.prod(shape)
        value = self._recipe.value(name, run if whole else None).reshape(-1)[start : start + run.numel()]
        if address(value) != address(run):
            run.copy_(value)

    def value(self, name: str) -> torch.Tensor:
        return device.placed(self._recipe.value(name))

    def sample(self, name: str) -> torch.Tensor:
        return self.value(name)

    def digest(self, name: str) -> str | None:
        return self._recipe.digest(name) if name in self._recipe else None

    def close(self) -> None:
        pass


class Renamed:
    """The initial values of a model whose tensors have got other names, since it was cut into layers."""

    def __init__(self, initial: InitialValues, before: Mapping[str, str]) -> None:
        """`before` maps each tensor's name to the one that `initial` knows."""
        self._initial, self._before = initial, before

    def fill(self, name: str, start: int, run: torch.Tensor) -> None:
        self._initial.fill(self._before[name], start, run)

    def value(self, name: str) -> torch.Tensor:
        return self._initial.value(self._before[name])

    def sample(self, name: str) -> torch.Tensor:
        return self._initial.sample(self._before[name])

    def digest(self, name: str) -> str | None:
        return self._initial.digest(self._before[name]) if name in self._before else None

    @property
    def bytes_read(self) -> int:
        return self._initial.bytes_read

    def close(self) -> None:
        self._initial.close()
