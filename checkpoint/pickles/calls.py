"""The allow-list of calls in a pickle: evaluates known names, and turns every other call into an `Opaque`.

The forms of tensors are those of torch 2.13 `torch/_utils.py` (`_rebuild_*`) and `torch/serialization.py` (`persistent_id`).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from elastic.checkpoint.pickles.origin import Origin
from elastic.checkpoint.pickles.tensors import tensor
from elastic.checkpoint.pickles.values import Global, Opaque, PickledStorage
from elastic.checkpoint.stored import is_tensor

STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": None,
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype) and "q" not in name and "bits" not in name}
_NUMPY_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u4": "I", "u8": "Q", "b1": "?"}
_UNKNOWN = object()


def resolve(name: Global) -> Any:
    """Returns the value of a name: a dtype of torch, or the name itself."""
    return _DTYPES.get(name.name, name) if name.module == "torch" else name


def storage(origin: Origin, persistent: Any) -> PickledStorage:
    """Returns the storage of a persistent id. Raises CheckpointError if it is not one of a known type."""
    match persistent:
        case ("storage", Global(module=("torch" | "torch.storage"), name=kind), str(key), str(), int(count)) if kind in STORAGES:
            return PickledStorage(key=key, dtype=STORAGES[kind], count=count)
    raise origin.refuse("it refers to something outside the pickle that is not a storage of a known type")


def call(origin: Origin, target: Any, args: Any) -> Any:
    """Returns the value of `target(*args)` for a known name, an `Opaque` for an unknown one. Raises CheckpointError if it is not a name."""
    if isinstance(target, Opaque) and isinstance(args, tuple):
        return Opaque(target.cls, (target, *args))
    if not isinstance(target, Global) or not isinstance(args, tuple):
        raise origin.refuse(f"its pickle calls something that is not a name: {type(target).__name__}")
    known = _CALLS.get((target.module, target.name))
    made = known(origin, *args) if known else _UNKNOWN
    return Opaque(target, args) if made is _UNKNOWN else made


def _parameter(origin: Origin, data: Any, *rest: Any) -> Any:
    if not is_tensor(data):
        raise origin.refuse("it makes a parameter from something that is not a tensor")
    return data


def _from_type(origin: Origin, function: Any, kind: Any, args: Any, state: Any) -> Any:
    if kind in (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter")):
        return call(origin, function, args)
    return _UNKNOWN


def _size(origin: Origin, shape: Any = ()) -> Any:
    return tuple(shape) if isinstance(shape, (tuple, list)) else _UNKNOWN


def _ordered(origin: Origin, pairs: Any = ()) -> Any:
    return OrderedDict() if not pairs else _UNKNOWN


def _encode(origin: Origin, text: Any, encoding: Any = "latin1") -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else _UNKNOWN


def _members(origin: Origin, found: Any = ()) -> Any:
    return set(found) if isinstance(found, (list, tuple)) and all(isinstance(one, (str, int, float)) for one in found) else _UNKNOWN


def _frozen_members(origin: Origin, found: Any = ()) -> Any:
    made = _members(origin, found)
    return made if made is _UNKNOWN else frozenset(made)


def _complex(origin: Origin, *parts: Any) -> Any:
    return complex(*parts) if len(parts) == 2 and all(isinstance(part, float) for part in parts) else _UNKNOWN


def _layout(origin: Origin, name: Any) -> Any:
    return name if isinstance(name, str) else _UNKNOWN


def _numpy_scalar(origin: Origin, kind: Any, data: Any = None) -> Any:
    if isinstance(kind, Opaque) and str(kind.cls) == "numpy.dtype" and isinstance(data, bytes) and kind.args:
        code = _NUMPY_NUMBERS.get(kind.args[0]) if isinstance(kind.args[0], str) else None
        order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "|"
        if code and order in ("<", "|") and len(data) == int(kind.args[0][1]):
            return struct.unpack(f"<{code}", data)[0]
    return _UNKNOWN


TENSORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_tensor_v3"): tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
}
"""Functions that make tensors, by module and name."""

_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    **TENSORS,
    ("torch", "Size"): _size,
    ("torch", "device"): lambda origin, *parts: ":".join(map(str, parts)) if all(isinstance(p, (str, int)) for p in parts) else _UNKNOWN,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): lambda origin, *default: {},
    ("_codecs", "encode"): _encode,
    ("torch.serialization", "_get_layout"): _layout,
    **{(module, "set"): _members for module in ("builtins", "__builtin__")},
    **{(module, "frozenset"): _frozen_members for module in ("builtins", "__builtin__")},
    **{(module, "complex"): _complex for module in ("builtins", "__builtin__")},
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
