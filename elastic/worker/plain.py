"""Optimizer and scheduler settings as values that stay as they are, as JSON, and back: numbers, containers, small tensors, without pickle.

`capture` copies a state. Objects in it that have a state of their own (a scheduler inside another one) stand there as `NestedObject`, and
what is no state but belongs to the object (functions) as `Left`: `revive` takes both from the object that is to go on from it.
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
    """The state of an object inside another one's state, and what it is."""

    kind: str
    state: Any


@dataclass(frozen=True, slots=True)
class Left:
    """Stands for what is not copied: whoever goes on has its own."""

    kind: str


def capture(value: Any) -> Any:
    """A copy that does not change any more."""
    if value is None or isinstance(value, bool | int | float | str):
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
    """What `capture` was given, of new values but for the objects of `live`, which is such a state of who goes on.

    Raises:
        TypeError: if it has not the same objects.
    """
    if isinstance(value, Left):
        return live
    if isinstance(value, NestedObject):
        if type(live).__name__ != value.kind:
            raise TypeError(f"there was a {value.kind}, and now there is a {type(live).__name__}")
        live.load_state_dict(revive(value.state, live.state_dict()))
        return live
    if type(value) is dict:
        beside = live if isinstance(live, dict) else {}
        return {key: revive(item, beside.get(key)) for key, item in value.items() if key in beside or not isinstance(item, Left)}
    if type(value) in (list, tuple):
        others = [*live] if isinstance(live, list | tuple) else []
        others += [None] * (len(value) - len(others))
        return type(value)(revive(item, other) for item, other in zip(value, others, strict=False))
    return capture(value)


def to_plain(value: Any) -> Any:
    """JSON types only. Raises TypeError for what cannot travel, such as a function."""
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
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} cannot travel")


def _plain_dict(value: dict[Any, Any]) -> Any:
    if any(not isinstance(key, str | int) for key in value):
        raise TypeError(f"a dict with keys {list(value)} cannot travel")
    pairs = [[key, to_plain(item)] for key, item in value.items()]
    if isinstance(value, defaultdict):
        name = getattr(value.default_factory, "__name__", None)
        if value.default_factory is not None and _FACTORIES.get(str(name)) is not value.default_factory:
            raise TypeError(f"a defaultdict of {name} cannot travel")
        return {"defaultdict": [name, pairs]}
    return {{Counter: "Counter", OrderedDict: "OrderedDict"}.get(type(value), "dict"): pairs}


def from_plain(value: Any) -> Any:
    """The inverse."""
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
