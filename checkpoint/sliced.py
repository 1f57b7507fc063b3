"""Copies values between a whole tensor and its slices in files, in long runs even where a slicing cuts rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from elastic.checkpoint.blocks import BLOCK_BYTES
from elastic.checkpoint.plan import Sliced, TensorPlace
from elastic.checkpoint.slices import Patch
from elastic.memory import raw
from elastic.memory.tensors import Landing, bytes_of

_MOST_BYTES = 64 * BLOCK_BYTES
"""Largest buffer in which rows are assembled."""
_WORDS = {1: "u1", 2: "i2", 4: "i4", 8: "i8"}

Fill = Callable[[str, np.ndarray, int], None]
"""Fills flat uint8 memory from a byte of a file."""


def words(memory: np.ndarray, itemsize: int) -> np.ndarray:
    """Views a tensor's bytes (flat) as one integer for each element, so that any dtype is copied bit for bit.

    NumPy copies them: torch would wake its threads for each of many short copies, which took up to 20 times as long on busy cores.
    """
    return raw.typed(memory, _WORDS[itemsize])


def gather(place: Sliced, start: int, values: torch.Tensor, fill: Fill) -> None:
    """Fills `values` (flat, contiguous) with the run of the whole tensor that begins at element `start`. Padding is not read."""
    landing = Landing(values)
    run = words(landing.bytes, values.element_size())
    for whole in place.slicing.patches(place.spec.shape, start, start + run.size):
        for patch in whole.divided(_MOST_BYTES // place.spec.itemsize):
            part = place.slices[patch.rank]
            if patch.rows == 1:
                _fill_row(part, patch, 0, run, start, fill)
            elif (patch.stride - patch.width) * part.spec.itemsize >= BLOCK_BYTES:  # whole blocks between rows need not be read
                for row in range(patch.rows):
                    _fill_row(part, patch, row, run, start, fill)
            else:
                memory = raw.typed(raw.empty(((patch.rows - 1) * patch.stride + patch.width) * run.itemsize), run.dtype)
                fill(part.file, raw.as_bytes(memory), part.offset + patch.at * part.spec.itemsize)
                for theirs, ours in _matched(patch, memory, patch.stride, run, start):
                    ours[:] = theirs
    landing.take()


def scatter(place: Sliced, start: int, values: torch.Tensor) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields `(file, offset, bytes)` for a run (of any shape) of the whole tensor that begins at element `start`; without padding."""
    run = words(bytes_of(values), values.element_size())
    for whole in place.slicing.patches(place.spec.shape, start, start + run.size):
        for patch in whole.divided(_MOST_BYTES // place.spec.itemsize):
            part, offset = place.slices[patch.rank], patch.at
            if patch.rows == 1:
                for first, count in patch.pieces:
                    yield part.file, part.offset + offset * part.spec.itemsize, raw.as_bytes(run[first - start :][:count])
                    offset += count
                continue
            memory = raw.typed(raw.empty(patch.rows * patch.width * run.itemsize), run.dtype)
            for theirs, ours in _matched(patch, memory, patch.width, run, start):
                theirs[:] = ours
            rows = [memory] if patch.stride == patch.width else memory.reshape(patch.rows, patch.width)
            for row in rows:
                yield part.file, part.offset + offset * part.spec.itemsize, raw.as_bytes(row)
                offset += patch.stride


def _fill_row(part: TensorPlace, patch: Patch, row: int, run: np.ndarray, start: int, fill: Fill) -> None:
    """Fills one row's pieces of `run` directly."""
    offset = patch.at + row * patch.stride
    for first, count in patch.pieces:
        fill(part.file, raw.as_bytes(run[first + row * patch.pitch - start :][:count]), part.offset + offset * part.spec.itemsize)
        offset += count


def _matched(patch: Patch, memory: np.ndarray, stride: int, run: np.ndarray, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields two views `[rows, count]` of each piece: in `memory`, with rows `stride` elements apart, and in the run from `start` on."""
    position = 0
    for first, count in patch.pieces:
        yield raw.rows(memory[position:], patch.rows, count, stride), raw.rows(run[first - start :], patch.rows, count, patch.pitch)
        position += count
