"""The allow-list: what a call of a known name becomes. Everything else becomes an `Opaque`.

The forms of tensors are those of torch 2.13 `torch/_utils.py` (`_rebuild_*`) and `torch/serialization.py` (`persistent_id`).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from checkpoint.pickles.archive import Archive
from checkpoint.pickles.stored import Stored
from checkpoint.pickles.values import Global, Opaque, Storage

_STORAGES = {
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
    """What a name stands for: a dtype of torch, or itself."""
    return _DTYPES.get(name.name, name) if name.module == "torch" else name


def storage(archive: Archive, persistent: Any) -> Storage:
    """The storage that a persistent id names."""
    match persistent:
        case ("storage", Global(module=("torch" | "torch.storage"), name=kind), str(key), str(), int(count)) if kind in _STORAGES:
            return Storage(key=key, dtype=_STORAGES[kind], count=count)
    raise archive.refuse("it refers to something outside of the pickle that is not a storage of a known type")


def call(archive: Archive, target: Any, args: Any) -> Any:
    """The value of `target(*args)` for a known name; an `Opaque` for what is unknown. Raises CheckpointError if it is neither."""
    if isinstance(target, Opaque) and isinstance(args, tuple):
        return Opaque(target.cls, (target, *args))
    if not isinstance(target, Global) or not isinstance(args, tuple):
        raise archive.refuse(f"its pickle calls something that is not a name: {type(target).__name__}")
    known = _CALLS.get((target.module, target.name))
    made = known(archive, *args) if known else _UNKNOWN
    return Opaque(target, args) if made is _UNKNOWN else made


def _tensor(archive: Archive, held: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Stored:
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    if not isinstance(held, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise archive.refuse("it makes a tensor from something that is not a storage, a size and a stride")
    dtype = dtype or _DTYPES[held.dtype or "uint8"]
    if type(held.count) is not int or held.count < 0:
        raise archive.refuse(f"storage {held.key!r} has no length")
    count = held.count if held.dtype else held.count // dtype.itemsize
    return Stored(archive=archive, key=held.key, dtype=dtype, count=count, offset=offset, shape=shape, stride=stride)


def _parameter(archive: Archive, data: Any, *rest: Any) -> Stored:
    if not isinstance(data, Stored):
        raise archive.refuse("it makes a parameter from something that is not a tensor")
    return data


def _from_type(archive: Archive, function: Any, kind: Any, args: Any, state: Any) -> Any:
    if kind in (Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter")):
        return call(archive, function, args)
    return _UNKNOWN


def _size(archive: Archive, shape: Any = ()) -> Any:
    return tuple(shape) if isinstance(shape, (tuple, list)) else _UNKNOWN


def _ordered(archive: Archive, pairs: Any = ()) -> Any:
    return OrderedDict() if not pairs else _UNKNOWN


def _encode(archive: Archive, text: Any, encoding: Any = "latin1") -> Any:
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else _UNKNOWN


def _members(archive: Archive, found: Any = ()) -> Any:
    return set(found) if isinstance(found, (list, tuple)) and all(isinstance(one, (str, int, float)) for one in found) else _UNKNOWN


def _numpy_scalar(archive: Archive, kind: Any, data: Any = None) -> Any:
    if isinstance(kind, Opaque) and str(kind.cls) == "numpy.dtype" and isinstance(data, bytes) and kind.args:
        code = _NUMPY_NUMBERS.get(kind.args[0]) if isinstance(kind.args[0], str) else None
        order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "|"
        if code and order in ("<", "|") and len(data) == int(kind.args[0][1]):
            return struct.unpack(f"<{code}", data)[0]
    return _UNKNOWN


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): _size,
    ("torch", "device"): lambda archive, *parts: ":".join(map(str, parts)) if all(isinstance(p, (str, int)) for p in parts) else _UNKNOWN,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): lambda archive, *default: {},
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): _members,
    ("__builtin__", "set"): _members,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
