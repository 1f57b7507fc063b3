"""Converts between runs and boxes: a run is `[start, stop)` in row-major order, a box is offsets and sizes. Pure arithmetic, no I/O."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from elastic.layout.runs import Run

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one per dimension."""


def boxes_of_run(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yields the run as boxes, ascending, each contiguous in the tensor's row-major order: at most 2 x dimensions - 1 boxes."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:
        yield from _in_row(shape, last, start - last * inner, stop - last * inner)
        return
    if start < first * inner:
        yield from _in_row(shape, first - 1, start - (first - 1) * inner, inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * inner < stop:
        yield from _in_row(shape, last, 0, stop - last * inner)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes_of_run(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)


def intersection(left: Box, right: Box) -> Box | None:
    """Returns the box that two boxes share, or None."""
    offsets, sizes = [], []
    for a, n, b, m in zip(left[0], left[1], right[0], right[1], strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        offsets.append(low)
        sizes.append(high - low)
    return tuple(offsets), tuple(sizes)


def runs_of_box(shape: Sequence[int], box: Box) -> Iterator[Run]:
    """Yields a box's contiguous runs in a tensor of `shape`, in the box's row-major order; those of an empty box may be empty."""
    offsets, sizes = box
    split = len(shape)
    while split and offsets[split - 1] == 0 and sizes[split - 1] == shape[split - 1]:
        split -= 1
    weights = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if split == 0:
        yield 0, math.prod(sizes)
        return
    length = sizes[split - 1] * weights[split - 1]
    base = sum(offset * weight for offset, weight in zip(offsets, weights, strict=True))
    for index in np.ndindex(*sizes[: split - 1]):
        start = base + sum(step * weight for step, weight in zip(index, weights, strict=False))
        yield start, start + length


def tiling_fault(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Returns why `boxes` do not tile a tensor of `shape` exactly once, or None if they do. Quadratic in boxes, vectorized."""
    for offsets, sizes in boxes:
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            return f"the chunk at {list(offsets)} has another number of dimensions than {list(shape)}"
        if any(o < 0 or n < 0 or o + n > extent for o, n, extent in zip(offsets, sizes, shape, strict=True)):
            return f"the chunk at {list(offsets)} of {list(sizes)} exceeds the shape {list(shape)}"
    boxes = [box for box in boxes if math.prod(box[1])]
    covered, whole = sum(math.prod(sizes) for _, sizes in boxes), math.prod(shape)
    if covered != whole:
        return f"its chunks hold {covered} of {whole} elements"
    if len(boxes) < 2:
        return None
    low = np.array([offsets for offsets, _ in boxes]).reshape(len(boxes), -1)
    high = low + np.array([sizes for _, sizes in boxes]).reshape(len(boxes), -1)
    for index in range(len(boxes) - 1):
        shared = (np.maximum(low[index], low[index + 1 :]) < np.minimum(high[index], high[index + 1 :])).all(axis=1)
        if shared.any():
            return f"its chunks at {low[index].tolist()} and {low[index + 1 + int(shared.argmax())].tolist()} overlap"
    return None
