"""Contiguous layers and unequal workers to ordered stages: the least bottleneck, exact for a given order of the workers.

Workers of a stage share its micro-batches in inverse proportion to their slowdowns, as if these could be divided at will; whole grains
are dealt out afterwards. The bottleneck is found by bisection: for a limit, a dynamic programme over stages and workers tells how many
layers can be covered at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from elastic.plan.partition import check_feasible
from elastic.plan.workload import Workload

_BISECTIONS = 40


def divide(workload: Workload, slowdowns: Sequence[float], stages: int) -> tuple[tuple[range, int], ...]:
    """The layers and the number of workers of each stage; workers are given out in the order of their `slowdowns`.

    Minimises the largest over stages of (seconds of the stage's layers for all micro-batches) / (sum of 1 / slowdown of its workers).
    Raises PlanError if there are more stages than layers or workers, or none.
    """
    check_feasible(len(workload.layers), len(slowdowns), stages)
    seconds = np.concatenate([[0.0], np.cumsum([layer.forward_s + layer.backward_s for layer in workload.layers])])
    power = np.concatenate([[0.0], np.cumsum([1 / slowdown for slowdown in slowdowns])])
    low, high = 0.0, float(seconds[-1]) * max(slowdowns) * (1 + 1e-9) + 1e-12
    found = _cover(seconds, power, stages, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        trial = _cover(seconds, power, stages, middle)
        if trial is None:
            low = middle
        else:
            high, found = middle, trial
    assert found is not None  # the highest limit lets any worker take all layers
    return found


def _cover(seconds: np.ndarray, power: np.ndarray, stages: int, limit: float) -> tuple[tuple[range, int], ...] | None:
    """A division in which no stage is above `limit` (seconds of layers per unit of power), if there is one."""
    layers, workers = len(seconds) - 1, len(power) - 1
    most = np.full(workers + 1, -1)  # layers that the first workers can cover at most in the stages so far
    most[0] = 0
    choices: list[np.ndarray] = []
    powers = limit * (power[None, :] - power[:, None])  # [first worker, worker behind the last]
    impossible = np.tril(np.ones((workers + 1, workers + 1), dtype=bool))
    for stage in range(1, stages + 1):
        reach = np.searchsorted(seconds, seconds[np.maximum(most, 0)][:, None] + powers * (1 + 1e-12), side="right") - 1
        reach = np.minimum(reach, layers - (stages - stage))
        reach[impossible | (most < 0)[:, None] | (reach <= most[:, None])] = -1
        choices.append(reach.argmax(axis=0))
        most = reach.max(axis=0)
    if most[workers] < layers:
        return None
    bounds = _bounds(seconds, powers, choices, layers, workers)
    return tuple((range(a, b), m - n) for (a, n), (b, m) in pairwise(bounds))


def _bounds(seconds: np.ndarray, powers: np.ndarray, choices: Sequence[np.ndarray], layers: int, workers: int) -> list[tuple[int, int]]:
    """(layers, workers) behind each stage, from (0, 0) on; taken back to front, then layers front to back as the limit allows."""
    cuts = [workers]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    cuts.reverse()
    bounds = [(0, 0)]
    stages = len(choices)
    for stage, (first, last) in enumerate(pairwise(cuts), 1):
        reach = int(np.searchsorted(seconds, seconds[bounds[-1][0]] + powers[first, last] * (1 + 1e-12), side="right")) - 1
        bounds.append((min(reach, layers - (stages - stage)), last))
    return bounds
