"""Builds schedules: the order in which each worker runs the forwards and backwards of its micro-batches.

A worker at stage s of S holds the activations of at most S - s micro-batches (1F1B's bound: Narayanan et al., "PipeDream", 2019, with a
flush). All workers run forwards, and backwards, in the same order: ascending, or dealt out (`elastic.plan.dealing`), with other bounds
then. This cannot deadlock: all micro-batches before the first unfinished one have left every worker, and no worker runs a later one before
it, so the worker that must run it next is free to do so.

If backwards are split, their second parts fill the time in which a worker would wait (see `elastic.plan.scheduling`).
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic.plan.actions import Action, Schedule, format, parse
from elastic.plan.plan import Stage
from elastic.plan.simulation import simulate
from elastic.plan.workload import Workload

__all__ = ["Action", "Schedule", "build", "format", "parse"]


def build(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    *,
    split: bool = False,
    dealt: bool = False,
    eager: int = 0,
) -> dict[int, tuple[Action, ...]]:
    """Builds the schedule by list scheduling over simulated time, with the workload's seconds and links that take no time.

    A free worker runs a backward if one is ready, else a forward that is ready and within the bound, else the first of these that becomes
    ready. Where a step then takes longer than it must, the order is that of patient workers if it is faster (`elastic.plan.scheduling`).
    `routes[stage][grain]` is a worker; a member without a grain has no actions. With equal costs and equal numbers of workers this is
    classic 1F1B.
    """
    return simulate(workload, stages, routes, split=split, dealt=dealt, eager=eager)[0]
