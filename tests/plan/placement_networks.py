"""Random networks, and the cost of groups computed directly from its definition: over all pairings and orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations

import numpy as np

Matrix = np.ndarray
Grouping = tuple[tuple[int, ...], ...]


def regions(seed: int, devices: int = 64, count: int = 5, jitter: float = 0.1) -> tuple[Matrix, Matrix]:
    """Devices in regions of uneven size on a square: latency grows and bandwidth falls with distance, every link a bit different."""
    random = np.random.default_rng(seed)
    sizes = random.multinomial(devices - count, random.dirichlet(np.full(count, 2.0))) + 1
    region = random.permutation(np.repeat(np.arange(count), sizes))
    at = random.uniform(size=(count, 2))[region]
    distance = np.hypot(*(at[:, None] - at).transpose(2, 0, 1))
    same = region[:, None] == region
    noise = np.exp(random.normal(0, jitter, size=(2, devices, devices)))
    noise = np.sqrt(noise * noise.swapaxes(1, 2))
    latency = np.where(same, 0.01, 0.005 + 0.2 * distance) * noise[0]
    bandwidth = np.where(same, 2.5e8, 1.6e8 / (1 + 3 * distance)) * noise[1]
    return latency, bandwidth


def uniform(seed: int, devices: int) -> tuple[Matrix, Matrix]:
    """Links without any structure."""
    random = np.random.default_rng(seed)
    latency, pace = random.uniform(size=(2, devices, devices))
    return (latency + latency.T) / 10, 1e6 * (0.1 + pace + pace.T)


def plain_cost(latency: Matrix, bandwidth: Matrix, groups: Sequence[Sequence[int]], exchange: float, boundary: float) -> float:
    """Groups of one size in their given order, of symmetric links, as the definition has it."""
    slowest = 0.0
    for group in groups:
        for member in group:
            spent = 0.0
            for other in group:
                if other != member:
                    spent += 2 * (latency[member][other] + exchange / (bandwidth[member][other] * len(group)))
            slowest = max(slowest, spent)
    handed_on = 0.0
    for one, two in pairwise(groups):
        pairings = ([latency[a][b] + boundary / bandwidth[a][b] for a, b in zip(one, order, strict=True)] for order in permutations(two))
        handed_on += min(max(links) for links in pairings)
    return slowest + 2 * handed_on


def groupings(devices: tuple[int, ...], size: int) -> Iterator[Grouping]:
    """All ways to cut devices into groups of `size`, in every order of the groups."""
    if not devices:
        yield ()
    for group in permutations(devices, size):
        if list(group) == sorted(group):
            rest = tuple(device for device in devices if device not in group)
            for others in groupings(rest, size):
                yield (group, *others)
