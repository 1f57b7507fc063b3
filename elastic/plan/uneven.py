"""Divides contiguous layers and unequal workers among ordered stages: the least bottleneck, exact for a given order of the workers.

Workers of a stage share its micro-batches in inverse proportion to their slowdowns, as if micro-batches were divisible; whole grains are
distributed later. Bisection finds the bottleneck: for a limit, a dynamic programme over stages and workers finds the layers that can be
covered. Covering as many layers as possible is not always best: every stage takes at least one, and the next one may be too long.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

import numpy as np

from elastic.plan.fleet import Fleet
from elastic.plan.memory import need
from elastic.plan.partition import StageParts, check_feasible
from elastic.plan.workload import Workload

_BISECTIONS = 40
_TINY = 1e-12


Rows = list[list[float]]
"""Bytes by first layer, and number of further layers."""


def divide(workload: Workload, fleet: Fleet, stages: int) -> StageParts:
    """Returns the layers and the number of workers of each stage; workers are used in their order in `fleet`.

    Minimises the largest over stages of (seconds of the stage's layers for all micro-batches) / (sum of 1 / slowdown of its workers).
    Raises PlanError if there are more stages than layers or workers, or none.
    """
    check_feasible(len(workload.layers), len(fleet.workers), stages)
    found = _least(workload, fleet, stages, [])
    assert found is not None  # the highest limit lets any worker take all layers
    return found


def divide_within(workload: Workload, fleet: Fleet, stages: int) -> StageParts | None:
    """Does the same as `divide`, within the memory of each worker (with an even share of the grains); None if impossible."""
    check_feasible(len(workload.layers), len(fleet.workers), stages)
    return _least(workload, fleet, stages, [_fitting(workload, fleet, stages - number) for number in range(stages)])


def _least(workload: Workload, fleet: Fleet, stages: int, fitting: Sequence[np.ndarray]) -> StageParts | None:
    slowdowns = [fleet.slowdown(worker) for worker in fleet.workers]
    seconds = np.concatenate([[0.0], np.cumsum([layer.forward_s + layer.backward_s for layer in workload.layers])])
    power = np.concatenate([[0.0], np.cumsum([1 / slowdown for slowdown in slowdowns])])
    low, high = 0.0, float(seconds[-1]) * max(slowdowns) * (1 + 1e-9) + 1e-12
    found = _cover(seconds, power, stages, high, fitting)
    for _ in range(_BISECTIONS if found is not None else 0):
        middle = (low + high) / 2
        trial = _cover(seconds, power, stages, middle, fitting)
        if trial is None:
            low = middle
        else:
            high, found = middle, trial
    return found


def _fitting(workload: Workload, fleet: Fleet, ahead: int) -> np.ndarray:
    """Returns [first worker, one past the last, first layer] -> one past the last layer that fits, as the stage `ahead` from the end."""
    layers, workers = len(workload.layers), len(fleet.workers)
    found = np.zeros((workers + 1, workers + 1, layers + 1), dtype=np.int64)
    needs: dict[int, tuple[Rows, Rows]] = {}
    for first in range(workers):
        for last in range(first + 1, workers + 1):
            count = last - first
            if count not in needs:
                grains = -(-workload.grains // count)
                kept = {"replicas": fleet.replicas, "outlive": fleet.outlive, "on_device": fleet.on_device}
                one = partial(need, workload, members=count, workers=workers, ahead=ahead, grains=grains, **kept)
                rows = [[one(layers=range(start, stop)) for stop in range(start + 1, layers + 1)] for start in range(layers)]
                on_host = [[each.host_bytes for each in row] for row in rows]
                needs[count] = on_host, [[each.device_bytes for each in row] for row in rows] if fleet.on_device else []
            on_host, on_device = needs[count]
            reach = _within(on_host, fleet.least_memory(fleet.workers[first:last]))
            if on_device:
                reach = np.minimum(reach, _within(on_device, fleet.least_device_memory(fleet.workers[first:last])))
            found[first, last, :layers] = reach
    return found


def _within(needs: Rows, memory: float) -> np.ndarray:
    """Returns, for each first layer, one past the last layer that fits."""
    return np.array([start + bisect_right(row, memory) for start, row in enumerate(needs)], dtype=np.int64)


def _cover(seconds: np.ndarray, power: np.ndarray, stages: int, limit: float, fitting: Sequence[np.ndarray]) -> StageParts | None:
    """Returns a division in which no stage is above `limit` (seconds of layers per unit of power), or None."""
    layers, workers = len(seconds) - 1, len(power) - 1
    room = limit * np.maximum(power[None, :] - power[:, None], 0.0) * (1 + _TINY)  # seconds of a stage of workers [first, last)
    reach = np.searchsorted(seconds, seconds[None, None, :] + room[:, :, None], side="right") - 1  # [first, last, first layer]
    reached = np.zeros((workers + 1, layers + 1), dtype=bool)  # [first workers, layers]: may have gaps
    reached[0, 0] = True
    history = [reached]
    reaches = [np.minimum(reach, fits) for fits in fitting] or [reach] * stages
    for within in reaches:
        reached = _extended(reached, within)
        history.append(reached)
    return _parts(history, reaches) if reached[workers, layers] else None


def _extended(reached: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Returns what is reached with one more stage, of at least one worker and one layer."""
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


def _parts(history: Sequence[np.ndarray], reaches: Sequence[np.ndarray]) -> StageParts:
    """Traces back the division whose earlier stages have fewest workers and layers."""
    last, stop = (size - 1 for size in history[-1].shape)
    parts: list[tuple[range, int]] = []
    for reached, reach in zip(reversed(history[:-1]), reversed(reaches), strict=True):
        firsts, starts = np.nonzero(reached[:last, :stop])
        first, start = next((f, s) for f, s in zip(firsts.tolist(), starts.tolist(), strict=True) if reach[f, last, s] >= stop)
        parts.append((range(start, stop), last - first))
        last, stop = first, start
    return tuple(reversed(parts))
