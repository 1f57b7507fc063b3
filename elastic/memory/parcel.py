"""Objects in anonymous memory that one process writes and another maps: micro-batches and data sets, between processes of one program.

A parcel is a memfd with a pickle and, each aligned, the memory of its tensors and arrays, which the reader does not copy. It has no name in
a file system, so nothing is left of it when its processes end. Only processes that a worker has started itself may send it one.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic.memory import raw
from elastic.memory.tensors import of_host_bytes


@dataclass(frozen=True, slots=True)
class Parcel:
    """A pickled object. It shares the memory of the object's tensors and arrays until it is written."""

    pickled: bytes
    buffers: Sequence[pickle.PickleBuffer]

    @classmethod
    def of(cls, value: object) -> Parcel:
        """Pickles an object. Raises whatever its classes raise if it cannot be pickled."""
        found, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        _Pickler(found, protocol=5, buffer_callback=buffers.append).dump(value)
        return cls(found.getvalue(), buffers)

    def written(self) -> tuple[int, list[int]]:
        """Copies it into a new memfd. Returns the descriptor, and the size of each part in bytes."""
        parts = [raw.view(self.pickled), *(buffer.raw() for buffer in self.buffers)]
        descriptor = os.memfd_create("elastic-parcel", os.MFD_CLOEXEC)
        try:
            with open(descriptor, "wb", buffering=0, closefd=False) as file:
                for part in parts:
                    _write(file, part)
                    _write(file, raw.view(bytes(raw.padding(part.nbytes))))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, [part.nbytes for part in parts]


def _write(file: io.RawIOBase, part: memoryview) -> None:
    while part.nbytes:
        part = part[file.write(part) :]


def opened(descriptor: int, sizes: Sequence[int]) -> Any:
    """Returns the object of a parcel that was written. Its tensors and arrays lie in the parcel's memory; `descriptor` may be closed.

    Raises whatever the object's classes raise if they cannot be imported or unpickled here.
    """
    starts = [0, *itertools.accumulate(size + raw.padding(size) for size in sizes)]
    whole = raw.view(mmap.mmap(descriptor, starts[-1]))  # type: ignore[arg-type]
    pickled, *buffers = (whole[start : start + size] for start, size in zip(starts, sizes, strict=False))
    return pickle.loads(pickled, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Puts the memory of ordinary contiguous tensors beside the pickle, as pickle does with that of arrays."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not _is_plain(value):
            return NotImplemented  # the tensor's own way, which keeps strides
        memory = value.reshape(-1).view(torch.uint8).numpy()
        buffer = pickle.PickleBuffer(memory)  # pyright: ignore[reportArgumentType] an array is a buffer
        return _tensor, (buffer, value.dtype, tuple(value.shape))


def _is_plain(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or not tensor.is_cpu or tensor.requires_grad or tensor.is_quantized or not tensor.numel():
        return False
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _tensor(memory: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return of_host_bytes(raw.as_bytes(memory), dtype, shape)
