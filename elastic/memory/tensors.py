"""Tensors' memory: allocation, copies, and the two ways between a tensor and bytes on the host. The contract is the package's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from elastic.memory import raw

TensorShape = int | Sequence[int]


def empty(shape: TensorShape, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory: all of it is written before anybody reads it."""
    return torch.empty(shape, dtype=dtype)


def zeros(shape: TensorShape, dtype: torch.dtype) -> torch.Tensor:
    """Memory of zeros."""
    return torch.zeros(shape, dtype=dtype)


def filled(shape: TensorShape, value: float, dtype: torch.dtype) -> torch.Tensor:
    """Memory with one value everywhere."""
    return torch.full((shape,) if isinstance(shape, int) else tuple(shape), value, dtype=dtype)


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros in the shape, dtype and order of dimensions of a tensor, where it lies."""
    return torch.zeros_like(tensor)


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory of their own, where the tensor lies."""
    return tensor.clone()


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values in contiguous memory that starts aligned; itself where it already is so."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor if tensor.data_ptr() % raw.ALIGNMENT_BYTES == 0 else tensor.clone(memory_format=torch.contiguous_format)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values as they are now, on the host, row-major: flat uint8, read-only. It shares the memory of a contiguous tensor."""
    found = _on_host(tensor).reshape(-1).view(torch.uint8).numpy()
    found.setflags(write=False)
    return found


def values_of(tensor: torch.Tensor) -> np.ndarray:
    """A result on the host, to go on with in NumPy; shares the tensor's memory."""
    return _on_host(tensor).numpy()


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The values where NumPy finds them; a copy waits for what computes them."""
    return tensor.detach() if tensor.is_cpu else tensor.detach().cpu()


def of_bytes(memory: np.ndarray, dtype: torch.dtype, shape: TensorShape = -1) -> torch.Tensor:
    """Received bytes (uint8, writable) as a tensor. It shares the memory, which must not change any more."""
    found = torch.from_numpy(memory) if memory.size else torch.empty(0, dtype=torch.uint8)
    return found.view(dtype).view(shape)


def retyped(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same flat memory as elements of another dtype. Raises RuntimeError if the sizes do not match."""
    return memory.view(dtype)


def strided(memory: torch.Tensor, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """Flat memory as a tensor of any strides (elements), which share it. Raises RuntimeError if it is too short."""
    return memory.as_strided(tuple(shape), tuple(strides))


def of_array(array: np.ndarray) -> torch.Tensor:
    """Numbers of the host as a tensor. It shares the memory, which must not change any more."""
    return torch.from_numpy(array)


class HostBytes:
    """The bytes of one tensor that are asked for again and again, as it changes."""

    __slots__ = ("_bytes", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        """Raises ValueError unless the tensor is contiguous."""
        self.tensor = _contiguous(tensor)
        self._bytes = bytes_of(tensor)

    def now(self) -> np.ndarray:
        """The values as they are when this returns, as of `bytes_of`."""
        return self._bytes


class Landing:
    """A tensor that is filled through bytes on the host, by a link or from a file."""

    __slots__ = ("_tensor", "bytes")

    def __init__(self, tensor: torch.Tensor) -> None:
        """Raises ValueError unless the tensor is contiguous."""
        self._tensor = _contiguous(tensor)
        self.bytes: np.ndarray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        """Flat uint8 memory to be filled; it belongs to whoever fills it until `take`."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.bytes.size

    def take(self) -> torch.Tensor:
        """The tensor, once the bytes have come; what is computed from now on sees them."""
        return self._tensor


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"memory of strides {tensor.stride()} and shape {tuple(tensor.shape)} has no bytes in a row")
    return tensor
