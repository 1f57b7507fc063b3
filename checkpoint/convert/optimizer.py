"""Reads an optimizer's state dict, nested or flattened, with names or numbers; returns its contents by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from elastic.checkpoint.convert.jsonable import decode, encode
from elastic.checkpoint.convert.numbered import LIKE_PARAM, Order, names_of
from elastic.checkpoint.state import Group, Spec
from elastic.checkpoint.stored import ReadableTensor, is_tensor
from elastic.errors import CheckpointError

SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""States that torch's optimizers keep as tensors without dimensions; here they are numbers."""
TUPLES = frozenset({"betas", "etas", "step_sizes"})
"""Hyperparameters that are tuples in torch; here they are lists."""


@dataclass(slots=True, kw_only=True)
class Optimizer:
    """An optimizer's tensors and numbers by parameter name, and its groups."""

    tensors: dict[str, dict[str, ReadableTensor]] = field(default_factory=dict)
    scalars: dict[str, dict[str, float | int | bool]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)


def number(value: ReadableTensor) -> float | int | bool:
    """Reads the one element of a tensor without dimensions."""
    return value.run(0, 1)[0].item()


def settings_of(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a group's hyperparameters as JSON."""
    settings = {}
    for key, value in group.items():
        if key in ("params", "param_names"):
            continue
        if is_tensor(value) and not value.spec.shape:
            value = number(value)
        settings[key] = encode(list(value) if key in TUPLES and isinstance(value, tuple) else value, f"{where}.{key}")
    return settings


def setting(key: str, value: Any) -> Any:
    """Returns a hyperparameter as torch keeps it."""
    value = decode(value)
    return tuple(value) if key in TUPLES and isinstance(value, list) else value


def scalar_tensor(value: float) -> torch.Tensor:
    """Returns a number as torch's optimizers keep it: a float32 tensor, or float64 if float32 would change the value."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if single.item() == value else torch.tensor(value, dtype=torch.float64)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nests `state.NAME.STATE` and `param_groups.NAME.KEY`. Parameters with equal settings become one group, in order of appearance."""
    state: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, tail = str(key).partition(".")
        name, _, last = tail.rpartition(".")
        if kind in ("state", "param_groups") and name:
            (state if kind == "state" else settings).setdefault(name, {})[last] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, values in settings.items():
        plain = settings_of(values, name)
        groups.setdefault(repr(sorted(plain.items())), {"params": [], **values})["params"].append(name)
    return {"state": state, "param_groups": list(groups.values())}


def read_optimizer(
    value: Mapping[str, Any], *, flattened: bool, model: Mapping[str, Spec], order: Order, drops: Callable[[str], bool]
) -> Optimizer:
    """Reads an optimizer's state dict; `model` holds the parameters in order, without ties. Names for which `drops` is true are left out.

    Raises CheckpointError with a value that cannot be kept.
    """
    nested = unflatten(value) if flattened else value
    groups = nested["param_groups"]
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
        raise CheckpointError("a group of the optimizer has no list of its params")
    names = names_of(groups, nested.get("state", {}), model, order)
    numbered = any(not isinstance(key, str) for key in names)
    result = Optimizer()
    for position, group in enumerate(groups):
        settings = settings_of(group, f"group {position}")
        kept = tuple(names[key] for key in group["params"] if not drops(names[key]))
        result.groups.append(Group(names=kept, settings=settings))
    for key, states in nested.get("state", {}).items():
        if key not in names:
            raise CheckpointError(f"the optimizer has states of parameter {key!r}, which is in none of its groups")
        if not drops(names[key]):
            _read_states(names[key], states, result, model.get(names[key]) if numbered else None)
    return result


def _read_states(name: str, states: Mapping[str, Any], result: Optimizer, spec: Spec | None) -> None:
    if not isinstance(states, Mapping):
        raise CheckpointError(f"the optimizer's states of {name} are not a dict")
    for state, value in states.items():
        if value is None:
            continue
        if is_tensor(value) and state in SCALARS and not value.spec.shape:
            result.scalars.setdefault(name, {})[state] = number(value)
        elif is_tensor(value):
            if spec is not None and state in LIKE_PARAM and value.spec.shape != spec.shape:
                raise CheckpointError(
                    f"{state} of {name} has shape {list(value.spec.shape)}, not its parameter's {list(spec.shape)}: "
                    "the order of names is wrong"
                )
            result.tensors.setdefault(name, {})[state] = value
        elif type(value) in (bool, int, float):
            result.scalars.setdefault(name, {})[state] = value
        else:
            raise CheckpointError(f"state {state} of {name} is a {type(value).__name__}; only tensors and numbers can be kept")
