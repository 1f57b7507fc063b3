"""Memory of tensors: allocation, copies, and conversion between tensors and bytes on the host. The package's docstring is the contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from elastic.memory import device, raw
from elastic.memory.segment import OwnSegment

TensorShape = int | Sequence[int]

OF_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
"""Functions of torch that make a tensor of Python values. They are no operations, so only the call itself shows the values."""

_segment: OwnSegment | None = None


def use_segment(segment: OwnSegment | None) -> None:
    """Makes the lasting memory of this process, from now on, part of a segment; None makes it ordinary memory again."""
    global _segment
    _segment = segment


def outlives() -> bool:
    """Returns whether this process has a segment, in which lasting memory outlives it. Memory of a device never does."""
    return _segment is not None and device.on_host()


def lasting(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocates a flat tensor of zeros that outlives this process, if it has a segment and computes on the CPU.

    Raises:
        MemoryError: if the segment has no room.
    """
    if not elements or not device.on_host():
        return torch.zeros(elements, dtype=dtype, device=device.current())
    return host_lasting(elements, dtype)


def host_lasting(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocates a flat tensor of zeros on the host that outlives this process, if it has a segment."""
    if _segment is None or not elements:
        return torch.zeros(elements, dtype=dtype)
    return of_host_bytes(_segment.allocate(elements * dtype.itemsize), dtype)


def lasting_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a flat tensor that outlives this process, if it has a segment."""
    return tensor.clone() if not outlives() else lasting(tensor.numel(), tensor.dtype).copy_(tensor.detach())


def place_of(tensor: torch.Tensor) -> int | None:
    """Returns the offset of the tensor's first element in this process's segment; None if it lies elsewhere."""
    return None if _segment is None or not tensor.is_cpu else _segment.offset_of(tensor.data_ptr())


def address(tensor: torch.Tensor) -> int:
    """Returns the address of the tensor's first element."""
    return tensor.data_ptr()


def empty(shape: TensorShape, dtype: torch.dtype) -> torch.Tensor:
    """Allocates an uninitialised tensor; the caller must write all of it before it is read."""
    return torch.empty(shape, dtype=dtype, device=device.current())


def on_host(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocates a flat uninitialised tensor in host memory, wherever layers compute, for bytes of files."""
    return of_host_bytes(raw.empty(elements * dtype.itemsize), dtype)


def zeros(shape: TensorShape, dtype: torch.dtype) -> torch.Tensor:
    """Allocates a tensor of zeros."""
    return torch.zeros(shape, dtype=dtype, device=device.current())


def filled(shape: TensorShape, value: float, dtype: torch.dtype) -> torch.Tensor:
    """Allocates a tensor with one value everywhere."""
    return torch.full((shape,) if isinstance(shape, int) else tuple(shape), value, dtype=dtype, device=device.current())


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Allocates zeros in the shape, dtype and order of dimensions of a tensor, on its device."""
    return torch.zeros_like(tensor)


def copy(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of the tensor, on its device."""
    return tensor.clone()


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's values in contiguous, aligned memory; the tensor itself if it is so already."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor if tensor.data_ptr() % device.alignment() == 0 else tensor.clone(memory_format=torch.contiguous_format)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Returns the tensor's current values on the host, row-major: flat uint8, read-only. Shares the memory of a contiguous tensor."""
    found = _on_host(tensor).reshape(-1).view(torch.uint8).numpy()
    found.setflags(write=False)
    return found


def values_of(tensor: torch.Tensor) -> np.ndarray:
    """Returns the tensor's values as a NumPy array on the host; shares the tensor's memory."""
    return _on_host(tensor).numpy()


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the values in host memory; the copy from a device waits for the computation of them."""
    return tensor.detach() if tensor.is_cpu else tensor.detach().cpu()


def of_bytes(memory: np.ndarray, dtype: torch.dtype, shape: TensorShape = -1) -> torch.Tensor:
    """Returns received bytes (uint8, writable) as a tensor where layers compute. On the CPU it shares the memory, which must not change."""
    return device.placed(of_host_bytes(memory, dtype, shape))


def of_host_bytes(memory: np.ndarray, dtype: torch.dtype, shape: TensorShape = -1) -> torch.Tensor:
    """Returns bytes (uint8, writable) as a tensor on the host; shares the memory."""
    found = torch.from_numpy(memory) if memory.size else torch.empty(0, dtype=torch.uint8)
    return found.view(dtype).view(shape)


def retyped(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the same flat memory as elements of another dtype. Raises RuntimeError if the sizes do not match."""
    return memory.view(dtype)


def strided(memory: torch.Tensor, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    """Returns flat memory as a tensor with these strides (in elements); shares it. Raises RuntimeError if it is too short."""
    return memory.as_strided(tuple(shape), tuple(strides))


def part(base: torch.Tensor, shape: Sequence[int], strides: Sequence[int], offset: int) -> torch.Tensor:
    """Returns a view of the memory that `base` lies in; `offset` counts elements from where that memory begins, not from `base`."""
    return base.as_strided(tuple(shape), tuple(strides), offset)


def hollow(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor of this shape where layers compute, all of whose elements are one element in memory: it stands for a later one."""
    return torch.zeros((), dtype=dtype, device=device.current()).expand(tuple(shape))


def is_hollow(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor has less memory than its elements need, as those that `hollow` makes; never one of a single element."""
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() < tensor.nbytes


def of_array(array: np.ndarray) -> torch.Tensor:
    """Returns a NumPy array as a tensor. It shares the memory, which must not change any more."""
    return torch.from_numpy(array)


class HostBytes:
    """The bytes of one tensor, for repeated reading while the tensor changes."""

    __slots__ = ("_bytes", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        """Raises ValueError unless the tensor is contiguous."""
        self.tensor = contiguous_only(tensor)
        self._bytes = bytes_of(tensor) if tensor.is_cpu else raw.empty(0)

    def now(self) -> np.ndarray:
        """Returns the current values, in the form of `bytes_of`."""
        return self._bytes if self.tensor.is_cpu else bytes_of(self.tensor)


class Landing:
    """A tensor that a link or a file fills through bytes on the host."""

    __slots__ = ("_tensor", "bytes")

    def __init__(self, tensor: torch.Tensor) -> None:
        """Raises ValueError unless the tensor is contiguous."""
        self._tensor = contiguous_only(tensor)
        flat = tensor.detach().reshape(-1)
        self.bytes: np.ndarray = flat.view(torch.uint8).numpy() if tensor.is_cpu else raw.empty(flat.nbytes)
        """Flat uint8 memory to be filled; it belongs to the writer until `take`."""

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.bytes.size

    def begin(self) -> None:
        """Makes the bytes ready to be written to again, after a `take`."""

    def take(self) -> torch.Tensor:
        """Returns the tensor. Call it when the bytes have arrived; all later computation sees them."""
        if not self._tensor.is_cpu and self.bytes.size:
            with torch.no_grad():
                self._tensor.reshape(-1).view(torch.uint8).copy_(torch.from_numpy(self.bytes))
        return self._tensor


def contiguous_only(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor itself. Raises ValueError unless it is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of strides {tensor.stride()} and shape {tuple(tensor.shape)} is not contiguous")
    return tensor
