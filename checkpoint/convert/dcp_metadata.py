"""Writes DCP's `.metadata` by pickling stand-ins under the names of torch's classes: importing those would take 120 MiB of memory."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from elastic.checkpoint.dtypes import dtype_of
from elastic.checkpoint.state import Spec

VERSION = "1.0.0"
"""The version of the metadata of torch 2.13."""

_METADATA = "torch.distributed.checkpoint.metadata"

Chunks = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Offsets and sizes of chunks."""

Placed = tuple[Any, str, int, int]
"""A chunk or value: `(key, offsets or None, number of the chunk or None)`, file, byte offset, length."""


class _Standin:
    """An object that pickles as an instance of the class of torch named `where`, with `state`."""

    where = ("", "")

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getstate__(self) -> Any:
        return self.state


def _standin(module: str, name: str) -> type[_Standin]:
    return type(name, (_Standin,), {"where": (module, name)})


class _Encoding:
    """torch's number for a memory format; 0 is contiguous."""

    where = (_METADATA, "_MEM_FORMAT_ENCODING")

    def __reduce__(self) -> Any:
        return _Encoding, (0,)


_Metadata = _standin(_METADATA, "Metadata")
_Tensor = _standin(_METADATA, "TensorStorageMetadata")
_Bytes = _standin(_METADATA, "BytesStorageMetadata")
_Chunk = _standin(_METADATA, "ChunkStorageMetadata")
_Properties = _standin(_METADATA, "TensorProperties")
_Index = _standin(_METADATA, "MetadataIndex")
_Info = _standin("torch.distributed.checkpoint.filesystem", "_StorageInfo")


_Python: Any = getattr(pickle, "_Pickler")  # noqa: B009
"""The pickler in Python: the one in C would import the classes."""


class _MetadataPickler(_Python):
    def save_global(self, obj: Any, name: str | None = None) -> None:
        where = getattr(obj, "where", None)
        if where is None:
            super().save_global(obj, name)
            return
        self.write(pickle.GLOBAL + f"{where[0]}\n{where[1]}\n".encode())
        self.memoize(obj)


def tensor_entry(spec: Spec, chunks: Chunks) -> Any:
    """Returns the metadata's entry of a tensor."""
    parts = [_Chunk({"offsets": torch.Size(offsets), "sizes": torch.Size(sizes)}) for offsets, sizes in chunks]
    properties = _Properties((dtype_of(spec.dtype), torch.strided, False, _Encoding(), False))
    return _Tensor({"properties": properties, "size": torch.Size(spec.shape), "chunks": parts})


def bytes_entry() -> Any:
    """Returns the metadata's entry of a value that is not a tensor, with state None (an empty state would not be pickled)."""
    return _Bytes(None)


def metadata_bytes(items: Mapping[str, Any], paths: Mapping[str, tuple[str | int, ...]], places: Sequence[Placed]) -> bytes:
    """Returns the bytes of `.metadata`."""
    storage = {}
    for (key, offsets, number), file, begin, length in places:
        index = _Index({"fqn": key, "index": number} | ({} if offsets is None else {"offset": torch.Size(offsets)}))
        storage[index] = _Info({"relative_path": file, "offset": begin, "length": length})
    state = {"state_dict_metadata": dict(items), "planner_data": dict(paths), "storage_data": storage}
    stream = io.BytesIO()
    _MetadataPickler(stream, protocol=2).dump(_Metadata(state | {"storage_meta": None, "version": VERSION}))
    return stream.getvalue()
