"""Refuses `state_dict()` of layers that are not on this worker: their parameters have no elements here, and would be written empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from elastic.errors import TrainerError

_partial = False
_sized: set[int] = set()  # parameters that had elements once, by identity


@contextmanager
def partial() -> Iterator[None]:
    """The runtime's own look at a model's state_dict, whose values may be missing."""
    global _partial
    before, _partial = _partial, True
    try:
        yield
    finally:
        _partial = before


def note_whole(parameters: Iterable[nn.Parameter]) -> None:
    """These are whole, as their users made them: where one has no elements later, it is not on this worker."""
    _sized.update(id(parameter) for parameter in parameters if parameter.numel())


def refuse_partial(root: nn.Module) -> None:
    """Has `state_dict` of layers that are not on this worker refused from here on: their parameters have no elements here."""
    for module in root.modules():
        module.register_state_dict_pre_hook(_refuse)


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not _partial and any(not parameter.numel() and id(parameter) in _sized for parameter in module.parameters()):
        raise TrainerError(
            "state_dict() was called on layers that are not on this worker, which has only those of its stage: call trainer.state_dict() "
            "on every worker, and save what it returns on one, or give the Trainer checkpoint="
        )
