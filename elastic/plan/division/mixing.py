"""Makes stages of two shapes from different pools, for pools whose devices are not a multiple of the number of replicas."""

from __future__ import annotations

from itertools import permutations

from elastic.plan.division.rules import PoolCosts
from elastic.plan.division.shapes import Makeup, ReplicaCount, Shape


def mixtures(rules: PoolCosts, size: int, replicas: int) -> list[Makeup]:
    """Returns, per pair of shapes and amount of the first one's pool, the makeup that takes most of that pool and least of the other.

    The amount that a stage takes of a pool is counted as the number of stages with `replicas` devices of it that are then no longer
    possible. Mixtures that take as much of one pool as a stage of only one shape are left out: that stage would be no slower.
    """
    found: dict[Makeup, None] = {}
    for one, other in permutations(sorted(rules.shapes(size)), 2):
        if one.pool < other.pool:
            for count in _counts(rules.pools[one.pool].count, one, replicas):
                if _useful(rules.pools[other.pool].count, other, replicas - count, replicas):
                    found[Makeup((ReplicaCount(one, count), ReplicaCount(other, replicas - count)))] = None
    return list(found)


def _counts(devices: int, shape: Shape, replicas: int) -> set[int]:
    """Returns the most replicas of the shape for each number, below its tp, of whole stages that they cost."""
    whole = devices // replicas
    most = ((devices - replicas * max(whole - cost, 0)) // shape.tp for cost in range(shape.tp))
    return {count for count in most if 0 < count < replicas}


def _useful(devices: int, shape: Shape, count: int, replicas: int) -> bool:
    left = devices - count * shape.tp
    return left >= 0 and devices // replicas - left // replicas < shape.tp
