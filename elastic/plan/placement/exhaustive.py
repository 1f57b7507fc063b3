"""Enumerates every division of few devices into groups: for so few, that costs less than a good search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import factorial, prod


def partitions(sizes: Sequence[int]) -> int:
    """Returns the number of ways to divide `sum(sizes)` devices into groups of these sizes, in any order."""
    alike = prod(map(factorial, Counter(sizes).values()))
    return factorial(sum(sizes)) // prod(map(factorial, sizes)) // alike


def every_partition(devices: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yields each division once. The first device's group is chosen first, in each distinct size that is left."""
    if not sizes:
        yield ()
        return
    first, rest = devices[0], devices[1:]
    for size in sorted(set(sizes)):
        left = list(sizes)
        left.remove(size)
        for others in combinations(rest, size - 1):
            remaining = [device for device in rest if device not in others]
            for groups in every_partition(remaining, left):
                yield ((first, *others), *groups)
