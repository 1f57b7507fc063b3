"""A tensor in a file of `torch.save`: where it lies, not what it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from checkpoint.pickles.archive import Archive

_DIMENSIONS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A view of `count` elements in the member `data/<key>`; `offset` and `stride` in elements.

    Raises CheckpointError if the view leaves its storage, or has more elements than it (as an expanded tensor does).
    """

    archive: Archive
    key: str
    dtype: torch.dtype
    count: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.count, self.offset, *self.shape, *self.stride)
        if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
            raise self._refuse("has sizes, strides or an offset that are no lengths")
        if len(self.shape) != len(self.stride) or len(self.shape) > _DIMENSIONS:
            raise self._refuse(f"has {len(self.shape)} sizes and {len(self.stride)} strides")
        held = self.archive.size(f"data/{self.key}")
        if held != self.count * self.dtype.itemsize:
            raise self._refuse(f"has a storage of {held} bytes instead of {self.count * self.dtype.itemsize}")
        if self.size and self._reach >= self.count:
            raise self._refuse(f"reaches element {self._reach} of a storage of {self.count}")
        if self.size > self.count:
            raise self._refuse(f"has {self.size} elements in a storage of {self.count}")

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def _reach(self) -> int:
        return self.offset + sum((extent - 1) * step for extent, step in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        """Whether row-major order is the order in the file."""
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and step != expected:
                return False
            expected *= extent
        return True

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The run of its elements in row-major order, flat. A view with gaps reads what lies between the rows that the run touches."""
        if not 0 <= start <= stop <= self.size:
            raise self._refuse(f"has no elements {start} to {stop}")
        if start == stop or self.contiguous:
            return self._span(self.offset + start, stop - start)
        inner = math.prod(self.shape[1:])
        first, last = start // inner, (stop - 1) // inner
        steps = zip(self.shape[1:], self.stride[1:], strict=True)
        length = (last - first) * self.stride[0] + sum((extent - 1) * step for extent, step in steps) + 1
        span = self._span(self.offset + first * self.stride[0], length)
        rows = torch.as_strided(span, (last - first + 1, *self.shape[1:]), self.stride)
        return rows.reshape(-1)[start - first * inner : stop - first * inner].clone()

    def _span(self, first: int, length: int) -> torch.Tensor:
        found = torch.empty(length, dtype=self.dtype)
        if length:
            self.archive.read(f"data/{self.key}", first * self.dtype.itemsize, found.view(torch.uint8).numpy())
        return found

    def _refuse(self, what: str) -> Exception:
        return self.archive.refuse(f"a tensor in storage {self.key!r} {what}")
