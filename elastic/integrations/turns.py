"""What a framework's loop iterates over and steps, where each of its turns is a whole step: neither has anything of its own to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset

from elastic.worker.plain.optimizer import PreparedOptimizer


class _Turns(Dataset[dict[str, Any]]):
    """A dataset of that many samples, without contents: the runtime loads those."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}


def _empty(rows: list[Any]) -> dict[str, Any]:
    return {}


def turns(steps: int, samples: int) -> DataLoader[Any]:
    """Returns a loader of `steps` empty batches, with a dataset of `samples`."""
    return DataLoader(_Turns(samples), batch_size=1, sampler=range(steps), collate_fn=_empty)


class StepOptimizer(PreparedOptimizer):
    """The optimizer that the framework's loop sees: its update is over when the loop comes to it."""

    def __init__(self, prepared: PreparedOptimizer) -> None:
        self.__dict__.update(prepared.__dict__)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Does nothing: the step was taken with all its micro-batches."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: there are no gradients behind a step."""


def overridden(given: object, name: str, base: type) -> bool:
    """Returns whether an object has a method of its own in the place of `base`'s."""
    return getattr(type(given), name, None) is not getattr(base, name, None)
