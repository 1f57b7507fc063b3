"""Values between a whole tensor and the slices of it that lie in files: in long runs also where rows are cut, whatever the dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from checkpoint.blocks import BLOCK_BYTES
from checkpoint.plan import Place, Sliced
from checkpoint.slices import Patch

_MOST_BYTES = 64 * BLOCK_BYTES
"""Of the copy in which rows are put together."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Fill = Callable[[str, np.ndarray, int], None]
"""Fills flat uint8 memory from a byte of a file."""


def words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as integers, flat, in host memory and in row-major order: copied bit for bit, whatever the dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(_WORDS[tensor.element_size()])


def gather(place: Sliced, start: int, values: torch.Tensor, fill: Fill) -> None:
    """Fills `values` (flat, contiguous) with the run of the whole tensor that begins at element `start`. Padding is not kept."""
    run = words(values)
    for whole in place.slicing.patches(place.spec.shape, start, start + run.numel()):
        for patch in whole.divided(_MOST_BYTES // place.itemsize):
            part = place.slices[patch.rank]
            if patch.rows == 1:
                _fill_row(part, patch, 0, run, start, fill)
            elif (patch.stride - patch.width) * part.itemsize >= BLOCK_BYTES:  # between rows there are blocks that need not be read
                for row in range(patch.rows):
                    _fill_row(part, patch, row, run, start, fill)
            else:
                memory = torch.empty((patch.rows - 1) * patch.stride + patch.width, dtype=run.dtype)
                fill(part.file, memory.view(torch.uint8).numpy(), part.offset + patch.at * part.itemsize)
                for theirs, ours in _matched(patch, memory, patch.stride, run, start):
                    ours.copy_(theirs)


def scatter(place: Sliced, start: int, values: torch.Tensor) -> Iterator[tuple[str, int, np.ndarray]]:
    """`(file, offset, bytes)` of a run of the whole tensor that begins at element `start`, of any shape; padding is left alone."""
    run = words(values)
    for whole in place.slicing.patches(place.spec.shape, start, start + run.numel()):
        for patch in whole.divided(_MOST_BYTES // place.itemsize):
            part, offset = place.slices[patch.rank], patch.at
            if patch.rows == 1:
                for first, count in patch.pieces:
                    yield part.file, part.offset + offset * part.itemsize, _bytes(run[first - start :][:count])
                    offset += count
                continue
            memory = torch.empty(patch.rows * patch.width, dtype=run.dtype)
            for theirs, ours in _matched(patch, memory, patch.width, run, start):
                theirs.copy_(ours)
            rows = [memory] if patch.stride == patch.width else memory.split(patch.width)
            for row in rows:
                yield part.file, part.offset + offset * part.itemsize, _bytes(row)
                offset += patch.stride


def _bytes(flat: torch.Tensor) -> np.ndarray:
    return flat.view(torch.uint8).numpy()


def _fill_row(part: Place, patch: Patch, row: int, run: torch.Tensor, start: int, fill: Fill) -> None:
    """One row's pieces go straight to where they are wanted."""
    offset = patch.at + row * patch.stride
    for first, count in patch.pieces:
        fill(part.file, _bytes(run[first + row * patch.pitch - start :][:count]), part.offset + offset * part.itemsize)
        offset += count


def _matched(patch: Patch, memory: torch.Tensor, stride: int, run: torch.Tensor, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of `[rows, count]`, for each piece: in memory, its rows `stride` elements apart, and in the run that begins at `start`."""
    position = 0
    for first, count in patch.pieces:
        theirs = memory.as_strided((patch.rows, count), (stride, 1), position)
        yield theirs, run.as_strided((patch.rows, count), (patch.pitch, 1), run.storage_offset() + first - start)
        position += count
