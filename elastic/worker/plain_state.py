"""Converts optimizer and scheduler settings to unchanging copies and to JSON, and back: numbers, containers, small tensors; no pickle.

`capture` copies a state. An object in it with its own state (a scheduler inside another one) becomes a `NestedObject`; a value that is no
state (a function) becomes a `Left`. `revive` takes both from the live object that loads the state.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from elastic.memory import tensors as memory

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_LEFT = (*_FUNCTIONS, types.ModuleType, weakref.ref, type, Optimizer, nn.Module)
_FACTORIES: dict[str, Any] = {"int": int, "float": float, "str": str, "list": list, "dict": dict, "set": set}


@dataclass(frozen=True, slots=True)
class NestedObject:
    """The state of an object inside another one's state; `kind` is its type's name."""

    kind: str
    state: Any


@dataclass(frozen=True, slots=True)
class Left:
    """Stands for a value that is not copied: the live object has its own. `kind` is the value's type name."""

    kind: str


def capture(value: Any) -> Any:
    """Returns a copy that later changes of `value` do not affect."""
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return memory.copy(value.detach())
    if isinstance(value, _LEFT):
        return Left(_kind(value))
    if type(value) is dict:
        return {key: capture(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(capture(item) for item in value)
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return NestedObject(type(value).__name__, capture(value.state_dict()))
    return copy.deepcopy(value)


def _kind(value: Any) -> str:
    return type(value).__name__


def revive(value: Any, live: Any) -> Any:
    """Undoes `capture`: returns new values, but takes nested objects and uncopied values from `live`, the state of the loading object.

    Raises:
        TypeError: if `live` has objects of other types.
    """
    if isinstance(value, Left):
        return live
    if isinstance(value, NestedObject):
        if type(live).__name__ != value.kind:
            raise TypeError(f"the saved state has a {value.kind}, but the present one a {type(live).__name__}")
        live.load_state_dict(revive(value.state, live.state_dict()))
        return live
    if type(value) is dict:
        current = live if isinstance(live, dict) else {}
        return {key: revive(item, current.get(key)) for key, item in value.items() if key in current or not isinstance(item, Left)}
    if type(value) in (list, tuple):
        others = [*live] if isinstance(live, list | tuple) else []
        others += [None] * (len(value) - len(others))
        return type(value)(revive(item, other) for item, other in zip(value, others, strict=False))
    return capture(value)


def to_plain(value: Any) -> Any:
    """Returns the value as JSON types. Raises TypeError for a value without a JSON form, such as a function."""
    if value is None or type(value) in (str, int, float, bool):  # most values, several times a step
        return value
    if isinstance(value, torch.Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), value.detach().reshape(-1).tolist()]}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biuf":
        shape = None if isinstance(value, np.generic) else list(value.shape)
        return {"numpy": [value.dtype.name, shape, value.reshape(-1).tolist()]}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, NestedObject):
        return {"nested": [value.kind, to_plain(value.state)]}
    if isinstance(value, Left):
        return {"left": value.kind}
    if isinstance(value, dict):
        return _plain_dict(value)
    if isinstance(value, deque):
        return {"deque": [[to_plain(item) for item in value], value.maxlen]}
    if isinstance(value, tuple):
        return {"tuple": [to_plain(item) for item in value]}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def _plain_dict(value: dict[Any, Any]) -> Any:
    if any(not isinstance(key, str | int) for key in value):
        raise TypeError(f"a dict with keys {list(value)} has no JSON form")
    pairs = [[key, to_plain(item)] for key, item in value.items()]
    if isinstance(value, defaultdict):
        name = getattr(value.default_factory, "__name__", None)
        if value.default_factory is not None and _FACTORIES.get(str(name)) is not value.default_factory:
            raise TypeError(f"a defaultdict of {name} has no JSON form")
        return {"defaultdict": [name, pairs]}
    return {{Counter: "Counter", OrderedDict: "OrderedDict"}.get(type(value), "dict"): pairs}


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        dtype, shape, numbers = content
        return torch.tensor(numbers, dtype=getattr(torch, dtype)).reshape(shape)
    if kind == "numpy":
        dtype, shape, numbers = content
        return np.array(numbers, dtype=dtype)[0] if shape is None else np.array(numbers, dtype=dtype).reshape(shape)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "nested":
        return NestedObject(content[0], from_plain(content[1]))
    if kind == "left":
        return Left(content)
    if kind == "deque":
        return deque(map(from_plain, content[0]), maxlen=content[1])
    if kind == "tuple":
        return tuple(from_plain(item) for item in content)
    if kind == "defaultdict":
        return defaultdict(_FACTORIES.get(content[0]), {key: from_plain(item) for key, item in content[1]})
    made = {key: from_plain(item) for key, item in content}
    return Counter(made) if kind == "Counter" else OrderedDict(made) if kind == "OrderedDict" else made
