"""Finds how many layers some resources can hold if each stage is bounded separately."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Resources:
    """All amounts of each resource that may be left, numbered; the last number is the full amount."""

    def __init__(self, units: Ints, available: Ints) -> None:
        dims = available + 1
        self.count = int(np.prod(dims))
        strides = np.concatenate([np.cumprod(dims[::-1])[-2::-1], [1]])
        self.amounts: Ints = np.stack(np.unravel_index(np.arange(self.count), tuple(dims)))
        enough = (self.amounts[None] >= units[:, :, None]).all(axis=1)
        left = np.arange(self.count)[None] - (units @ strides)[:, None]
        self.after: Ints = np.where(enough, left, -1)
        """(F, count): the number of the amounts left after one stage of a makeup, or -1."""


def furthest(ends: Ints, resources: Resources) -> Ints:
    """Returns (depth + 1, ..., resources): how far a prefix reaches at most, by the number of later stages and the resources left for it.

    `ends` (depth, ..., F, n) is how far a stage reaches at most, by the number of later stages, its makeup and its first layer.
    """
    depth, width = len(ends), ends.shape[-1] + 1
    ends = np.maximum.accumulate(ends, axis=-1)
    reached = np.concatenate([ends, np.zeros((*ends.shape[:-1], 1), dtype=ends.dtype)], axis=-1)
    rows = (width * np.arange(math.prod(ends.shape[1:-1]))).reshape(*ends.shape[1:-1], 1)
    found = np.zeros((depth + 1, *ends.shape[1:-2], resources.count), dtype=np.int64)
    later = np.full((*ends.shape[1:-2], resources.count + 1), width - 1)
    for number in range(depth - 1, -1, -1):
        later[..., :-1] = found[number + 1]
        found[number] = reached[number].take(rows + later.take(resources.after, axis=-1)).max(axis=-2)
    return found


def last_index(allowed: NDArray[np.bool_]) -> Ints:
    """Returns the last index along the last axis where `allowed` is true, 0 if there is none."""
    return np.where(allowed.any(axis=-1), allowed.shape[-1] - 1 - np.argmax(allowed[..., ::-1], axis=-1), 0)


def last_in_memory(most_in_flight: Ints, depth: int) -> Ints:
    """Returns (depth, F, n): how far a stage that fits into memory reaches, by the number of later stages, makeup and first layer."""
    return last_index(np.triu(most_in_flight, 1)[None] > np.arange(depth)[:, None, None, None])


def furthest_in_memory(most_in_flight: Ints, units: Ints, available: Ints) -> int:
    """Returns how many layers fit into memory at most, regardless of time."""
    layers = most_in_flight.shape[1] - 1
    resources = Resources(units, np.minimum(available, layers * units.max(axis=0)))
    return int(furthest(last_in_memory(most_in_flight, layers), resources)[0, -1])
