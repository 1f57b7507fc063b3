"""Contiguous layers and unequal workers to ordered stages: the least bottleneck, exact for a given order of the workers.

Workers of a stage share its micro-batches in inverse proportion to their slowdowns, as if these could be divided at will; whole grains
are dealt out afterwards. The bottleneck is found by bisection: for a limit, a dynamic programme over stages and workers tells how far
layers can be covered. To get furthest is not always best, since every stage takes a layer, and the next one may be too long.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastic.plan.partition import check_feasible
from elastic.plan.workload import Workload

_BISECTIONS = 40
_TINY = 1e-12


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
    room = limit * np.maximum(power[None, :] - power[:, None], 0.0) * (1 + _TINY)  # seconds of a stage of workers [first, last)
    reach = np.searchsorted(seconds, seconds[None, None, :] + room[:, :, None], side="right") - 1  # [first, last, first layer]
    reached = np.zeros((workers + 1, layers + 1), dtype=bool)  # by the first workers: a set of layers, which may have gaps
    reached[0, 0] = True
    history = [reached]
    for _ in range(stages):
        reached = _extended(reached, reach)
        history.append(reached)
    return _parts(history, reach) if reached[workers, layers] else None


def _extended(reached: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """What is reached with one more stage, of at least one worker and one layer."""
    count, width = reached.shape
    found = np.zeros_like(reached)
    for last in range(1, count):
        firsts, starts = np.nonzero(reached[:last])
        stops = reach[firsts, last, starts]
        edges = np.zeros(width + 1, dtype=np.int64)
        some = stops > starts
        np.add.at(edges, starts[some] + 1, 1)
        np.add.at(edges, stops[some] + 1, -1)
        found[last] = np.cumsum(edges)[:width] > 0
    return found


def _parts(history: Sequence[np.ndarray], reach: np.ndarray) -> tuple[tuple[range, int], ...]:
    """Back to front, of all ways the one whose earlier stages have fewest workers and layers."""
    last, stop = (size - 1 for size in history[-1].shape)
    parts: list[tuple[range, int]] = []
    for reached in reversed(history[:-1]):
        firsts, starts = np.nonzero(reached[:last, :stop])
        first, start = next((f, s) for f, s in zip(firsts.tolist(), starts.tolist(), strict=True) if reach[f, last, s] >= stop)
        parts.append((range(start, stop), last - first))
        last, stop = first, start
    return tuple(reversed(parts))
