"""Finds the blocks of a model: the `nn.ModuleList` with most parameters that does not lie inside of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from elastic.errors import TrainerError

WAYS = (
    "Train it as one layer: Trainer([model], ...), or as a plain loop with job.prepare (docs/dropin.md); or write the list of its layers "
    "by hand, and give Trainer(..., names=model)"
)
"""The ways out for a model that cannot be cut."""

_SECOND = 0.25
"""The share of the body's parameters from which on another list of modules is a second body."""


@dataclass(frozen=True, slots=True)
class Body:
    """The blocks of a model in order; `name` is that of their `nn.ModuleList`."""

    name: str
    blocks: tuple[nn.Module, ...]

    def block_name(self, index: int) -> str:
        """Returns the name of a block in the model."""
        return f"{self.name}.{index}"


def refusal(model: nn.Module, reason: str) -> TrainerError:
    """Returns the error for a model that cannot be cut."""
    return TrainerError(f"{type(model).__name__} cannot be cut into layers: {reason}. {WAYS}")


def body_of(model: nn.Module) -> Body:
    """Returns a model's body.

    Raises:
        TrainerError: if it has none, or two of about the same size.
    """
    found = sorted(_outermost("", model), key=lambda pair: -_size(pair[1]))
    if not found or not _size(found[0][1]):
        raise refusal(model, "it has no nn.ModuleList of blocks with parameters")
    name, blocks = found[0]
    if len(found) > 1 and len(found[1][1]) > 1 and _size(found[1][1]) >= _SECOND * _size(blocks):
        raise refusal(model, f"it has two lists of blocks, {name} and {found[1][0]}, and a pipeline has one")
    if len({id(block) for block in blocks}) < len(blocks):
        raise refusal(model, f"{name} has the same module at two places")
    return Body(name=name, blocks=tuple(blocks))


def _outermost(name: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    if isinstance(module, nn.ModuleList):
        yield name, module
        return
    for child, each in module.named_children():
        yield from _outermost(f"{name}.{child}" if name else child, each)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
