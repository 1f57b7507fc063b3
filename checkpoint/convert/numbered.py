"""Names the parameters of an optimizer's state that has numbers instead of names.

`torch.optim` numbers parameters in the order in which they were given, which no file records. So names come from `param_names` in the
file, from a rule, or from a proof: every state has a shape that only one parameter has. Equal shapes prove nothing: a guess could assign
moments to the wrong layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.checkpoint.state import Spec
from elastic.checkpoint.stored import is_tensor
from elastic.errors import CheckpointError

LIKE_PARAM = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg"})
"""States that have their parameter's shape."""

ParameterGroups = Sequence[Mapping[str, Any]]
NumberedStates = Mapping[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The user's names for numbered parameters: a list for each group, or a regular expression for each (the first match counts).

    Regular expressions also state that the order within each group is that of the model's definition.
    by_definition: the model's tensors are in the order of its definition, so regular expressions suffice.
    """

    groups: tuple[str, ...] = ()
    names: tuple[tuple[str, ...], ...] = ()
    by_definition: bool = True


def names_of(groups: ParameterGroups, states: NumberedStates, model: Mapping[str, Spec], order: Order) -> dict[Any, str]:
    """Returns the name of every parameter of the groups, by its key. `model`: the parameters in order, without ties.

    Raises CheckpointError if a rule is needed; nothing is guessed.
    """
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise CheckpointError("a parameter is in two groups of the optimizer")
    if all(isinstance(key, str) for key in keys):
        return {key: key for key in keys}
    if not order.groups and not order.names and all(len(group.get("param_names") or ()) == len(group["params"]) for group in groups):
        return {key: name for group in groups for key, name in zip(group["params"], group["param_names"], strict=True)}
    counts = [len(group["params"]) for group in groups]
    if order.names:
        return _listed(groups, order.names, counts)
    if not order.by_definition:
        raise CheckpointError(
            f"the optimizer numbers its parameters, in groups of {counts}; safetensors files do not keep their order: list them by a rule: "
            '[optimizer] names = [["first of the first group", ...], ...], in the order of the optimizer\'s groups'
        )
    if order.groups:
        return _listed(groups, _matched(list(model), order.groups, counts), counts)
    if (proved := _proved(groups, states, model)) is not None:
        return proved
    raise CheckpointError(
        f"the optimizer numbers its parameters, in groups of {counts}, and has no param_names; the model has {len(model)} parameters, "
        "and their shapes do not identify them. State the names by a rule: [optimizer] names = "
        '[["first of the first group", ...], ...], in the order in which the optimizer was given them; or, if each group has the order '
        "of the model's definition (that of model.parameters()), "
        '[optimizer] groups = ["regex of the first group", ...], such as [".*"] for one group of all'
    )


def _listed(groups: ParameterGroups, names: Sequence[Sequence[str]], counts: Sequence[int]) -> dict[Any, str]:
    if [len(mine) for mine in names] != list(counts):
        raise CheckpointError(f"rule optimizer.names has groups of {[len(mine) for mine in names]} names, but the optimizer has {counts}")
    return {key: name for group, mine in zip(groups, names, strict=True) for key, name in zip(group["params"], mine, strict=True)}


def _matched(names: Sequence[str], patterns: Sequence[str], counts: Sequence[int]) -> list[list[str]]:
    """Returns the names of each group: those for which its regular expression is the first that matches."""
    taken: list[list[str]] = [[] for _ in patterns]
    for name in names:
        for mine, pattern in zip(taken, patterns, strict=True):
            if re.search(pattern, name):
                mine.append(name)
                break
    if [len(mine) for mine in taken] != list(counts):
        raise CheckpointError(
            f"rule optimizer.groups gives groups of {[len(mine) for mine in taken]} parameters, but the optimizer has {counts}"
        )
    return taken


def _proved(groups: ParameterGroups, states: NumberedStates, model: Mapping[str, Spec]) -> dict[Any, str] | None:
    """Returns the only names that the shapes of one group's states permit; None if they are not unique.

    The group is all of the model or, in order, all of one of its modules; every state has a shape that only one parameter of the model
    has. If no parameter has a state, the order does not matter.
    """
    if len(groups) != 1:
        return None
    keys = list(groups[0]["params"])
    names = list(model)
    if len(keys) == len(names) and not any(states.get(key) for key in keys):
        return dict(zip(keys, names, strict=True))
    of_shape = Counter(spec.shape for spec in model.values())
    for mine in [names] if len(keys) == len(names) else _modules(names, len(keys)):
        if all(_is_of(states.get(key), model[name].shape, of_shape) for key, name in zip(keys, mine, strict=True)) and (
            len(keys) == len(names) or all(states.get(key) for key in keys)
        ):
            return dict(zip(keys, mine, strict=True))
    return None


def _is_of(state: Any, shape: tuple[int, ...], of_shape: Mapping[tuple[int, ...], int]) -> bool:
    """Returns whether a state can only belong to the one parameter of this shape; an empty state fits any parameter."""
    if not state:
        return True
    shapes = {value.spec.shape for name, value in state.items() if name in LIKE_PARAM and is_tensor(value)}
    return shapes == {shape} and of_shape[shape] == 1


def _modules(names: Sequence[str], count: int) -> list[list[str]]:
    """Returns the parameters, in order, of every module that has `count` of them (at least two)."""
    modules: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            modules.setdefault(".".join(parts[:depth]), []).append(name)
    return [mine for mine in modules.values() if len(mine) == count > 1]
