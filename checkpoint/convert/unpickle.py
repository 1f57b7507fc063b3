"""Reads pickles of torch without running them: names on a short list become inert values, every other name is refused.

A tensor becomes a `Strided` that lies in its file. Stand-ins take the place of the classes of DCP's metadata, so what is read does not
depend on the installed torch.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from checkpoint.convert.stored import name_of
from elastic.errors import CheckpointError

LIMIT = 1 << 30
"""Bytes of one pickle."""

Place = Callable[["Storage", int, tuple[int, ...], tuple[int, ...], str], Any]
"""Makes a tensor of a storage, its first element, shape, strides and dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A storage that a pickle refers to: its record's name, dtype (None: bytes) and elements."""

    key: str
    dtype: str | None
    count: int


class Record:
    """An inert instance of a class that was pickled: its arguments, and its state in attributes or in `state`."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update((key, value) for key, value in state.items() if isinstance(key, str))


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str | None


_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    **{(_METADATA, name): name for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")},
    **{(_METADATA, name): name for name in ("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): "_StorageInfo",
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): "_StoragePrefix",
    **{(module, name): "Path" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "PurePosixPath")},
}
_CLASSES = {key: type(name, (Record,), {"kind": name}) for key, name in _RECORDS.items()}
_STORAGES = {
    **{
        f"{name}Storage": dtype
        for name, dtype in {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16"}.items()
    },
    **{
        f"{name}Storage": dtype
        for name, dtype in {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}.items()
    },
    **{f"{name}Storage": dtype for name, dtype in {"Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128"}.items()},
    "UntypedStorage": None,
}


def _identity(value: Any, *_: Any) -> Any:
    return value


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise CheckpointError("bytes in another encoding than latin1")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, place: Place, where: str, trust: bool) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.place, self.where, self.trust = place, where, trust
        self.names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch", "device"): lambda kind, index=None: str(kind),
            ("torch.serialization", "_get_layout"): str,
            ("_codecs", "encode"): _encode,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): _identity,
            **_CLASSES,
        }
        for module in ("builtins", "__builtin__"):
            self.names |= {(module, "set"): set, (module, "frozenset"): frozenset, (module, "complex"): complex, (module, "slice"): slice}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.names:
            return self.names[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if self.trust:
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self.where} holds a pickle that wants {module}.{name}, which is not on the list of harmless names; if you "
            "trust whoever wrote it, pass --trust-pickle"
        )

    def persistent_load(self, pid: Any) -> Storage:
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(count)) if count >= 0:
                return Storage(key=key, dtype=dtype, count=count)
        raise CheckpointError(f"{self.where} refers to a storage in an unknown way")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
        if not isinstance(storage, Storage) or storage.dtype is None:
            raise CheckpointError(f"{self.where} holds a tensor without a storage of its dtype")
        return self._place(storage, offset, shape, strides, storage.dtype)

    def _tensor_v3(self, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Any:
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self.where} holds a tensor without a storage and a dtype")
        return self._place(storage, offset, shape, strides, name_of(dtype))

    def _place(self, storage: Storage, offset: Any, shape: Any, strides: Any, dtype: str) -> Any:
        numbers = (offset, *shape, *strides)
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or len(shape) != len(strides):
            raise CheckpointError(f"{self.where} holds a tensor with an impossible shape {shape} or strides {strides}")
        span = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)) + 1 if math.prod(shape) else 0
        size = getattr(torch, dtype).itemsize
        room = storage.count * (size if storage.dtype else 1)
        if (offset + span) * size > room:
            raise CheckpointError(f"{self.where} holds a tensor of shape {list(shape)} that leaves its storage {storage.key}")
        return self.place(storage, offset, tuple(shape), tuple(strides), dtype)


def no_tensors(storage: Storage, *_: Any) -> Any:
    """A `Place` for pickles that must not hold any."""
    raise CheckpointError(f"a pickle that should hold no tensor refers to storage {storage.key}")


def unpickle(data: bytes, *, where: str, place: Place = no_tensors, trust: bool = False) -> Any:
    """The value of a pickle; `where` names the file in errors. Raises CheckpointError for every name that is not on the list."""
    if len(data) > LIMIT:
        raise CheckpointError(f"{where} holds a pickle of {len(data)} bytes; at most {LIMIT} are read")
    try:
        return _Unpickler(data, place, where, trust).load()
    except (pickle.UnpicklingError, EOFError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} holds a damaged pickle: {error}") from error
    except (MemoryError, RecursionError, ImportError) as error:
        raise CheckpointError(f"{where} holds a pickle that cannot be read: {error or type(error).__name__}") from error
