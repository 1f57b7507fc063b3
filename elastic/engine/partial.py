"""Refuses `state_dict()` of layers that are not on this worker: their tensors have no elements here and would be saved empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from elastic.errors import TrainerError

_partial = False
_sized: set[int] = set()  # parameters and buffers that once had elements, by identity


@contextmanager
def partial() -> Iterator[None]:
    """Allows the runtime to call `state_dict` of a model whose values may be missing."""
    global _partial
    before, _partial = _partial, True
    try:
        yield
    finally:
        _partial = before


def note_whole(tensors: Iterable[torch.Tensor]) -> None:
    """Records tensors that have all elements, and lie in vectors: if one has none later, it is not on this worker."""
    _sized.update(id(tensor) for tensor in tensors if tensor.numel())


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


def refuse_partial(root: nn.Module) -> None:
    """Makes `state_dict` raise TrainerError for layers whose parameters or buffers are not on this worker."""
    for module in root.modules():
        module.register_state_dict_pre_hook(_refuse)


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not _partial and any(not tensor.numel() and id(tensor) in _sized for tensor in _tensors(module)):
        raise TrainerError(
            "state_dict() was called on layers that are not on this worker, which holds only its stage: call the Trainer's state_dict() "
            "on every worker and save the result on one, or give the Trainer checkpoint="
        )
