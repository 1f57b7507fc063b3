"""Refuses `state_dict()` of layers that are not on this worker: their parameters have no elements here and would be saved empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from elastic.errors import TrainerError

_partial = False
_sized: set[int] = set()  # parameters that once had elements, by identity


@contextmanager
def partial() -> Iterator[None]:
    """Allows the runtime to call `state_dict` of a model whose values may be missing."""
    global _partial
    before, _partial = _partial, True
    try:
        yield
    finally:
        _partial = before


def note_whole(parameters: Iterable[nn.Parameter]) -> None:
    """Records parameters that have all elements: if one has none later, it is not on this worker."""
    _sized.update(id(parameter) for parameter in parameters if parameter.numel())


def refuse_partial(root: nn.Module) -> None:
    """Makes `state_dict` raise TrainerError for layers whose parameters are not on this worker."""
    for module in root.modules():
        module.register_state_dict_pre_hook(_refuse)


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not _partial and any(not parameter.numel() and id(parameter) in _sized for parameter in module.parameters()):
        raise TrainerError(
            "state_dict() was called on layers that are not on this worker, which holds only its stage: call trainer.state_dict() "
            "on every worker and save the result on one, or give the Trainer checkpoint="
        )
