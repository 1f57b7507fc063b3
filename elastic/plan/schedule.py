"""The order in which each worker runs the forwards and backwards of its micro-batches: how it is made, and what it must satisfy.

A worker at stage s of S holds the activations of at most S - s micro-batches (1F1B's bound), and takes forwards, and backwards, in
ascending order. This cannot deadlock: all micro-batches below the lowest unfinished one have left every worker, and none above it can be
at a worker that has not had it, so whoever must run it next is free to do so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NoReturn

from elastic.errors import PlanError
from elastic.plan.actions import Action, Cell, Kind, Schedule, awaited, format, parse
from elastic.plan.plan import Stage
from elastic.plan.simulation import simulate
from elastic.plan.workload import Workload

__all__ = ["Action", "Kind", "Schedule", "build", "format", "parse", "validate"]


def build(workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]]) -> dict[int, tuple[Action, ...]]:
    """The schedule by list scheduling over simulated time; `routes[stage][grain]` is a worker. A member without a grain has no actions.

    Whenever a worker is free it runs a backward if one is ready, else a forward that is ready and within the bound, else whatever
    becomes so first. With equal costs and equal numbers of workers this is classic 1F1B.
    """
    return simulate(workload, stages, routes)[0]


def validate(schedule: Schedule, workload: Workload, routes: Sequence[Sequence[int]]) -> None:
    """Raises PlanError, which prints the schedule with the bad cells marked `>2F0<`, unless it can be run as routed.

    That is: every worker has exactly the actions routed to it, once; backwards ascend within a grain, whose sum is a fold in that order;
    at most S - s micro-batches are in flight at a worker of stage s; and the lists do not deadlock.
    """
    _check_routed(schedule, workload, routes)
    for worker, actions in schedule.items():
        _check_order(schedule, worker, actions, workload, len(routes))
    _check_progress(schedule, len(routes))


def _refuse(why: str, schedule: Schedule, marked: Collection[Cell] = ()) -> NoReturn:
    raise PlanError(f"{why}:\n{format(schedule, marked)}")


def _cells(schedule: Schedule) -> Iterator[tuple[Cell, Action]]:
    for worker, actions in schedule.items():
        for place, action in enumerate(actions):
            yield (worker, place), action


def _check_routed(schedule: Schedule, workload: Workload, routes: Sequence[Sequence[int]]) -> None:
    wanted: dict[Action, int] = {}
    for stage, route in enumerate(routes):
        for micro_batch in range(workload.micro_batches):
            worker = route[workload.grain_of(micro_batch)]
            wanted |= {Action(stage, "F", micro_batch): worker, Action(stage, "B", micro_batch): worker}
    seen: set[Action] = set()
    for (worker, place), action in _cells(schedule):
        if action not in wanted:
            _refuse(f"{action} is not part of the step", schedule, [(worker, place)])
        if wanted[action] != worker:
            _refuse(f"{action} is routed to worker {wanted[action]}, not to {worker}", schedule, [(worker, place)])
        if action in seen:
            _refuse(f"{action} is there twice", schedule, [(worker, place)])
        seen.add(action)
    for action, worker in wanted.items():
        if action not in seen:
            _refuse(f"{action} is missing from worker {worker}", schedule)


def _check_order(schedule: Schedule, worker: int, actions: Sequence[Action], workload: Workload, depth: int) -> None:
    in_flight = 0
    latest: dict[int, int] = {}
    for place, (stage, kind, micro_batch) in enumerate(actions):
        in_flight += 1 if kind == "F" else -1
        if in_flight > depth - stage:
            _refuse(f"more than {depth - stage} micro-batches in flight at stage {stage}", schedule, [(worker, place)])
        if kind == "B":
            grain = workload.grain_of(micro_batch)
            if micro_batch < latest.get(grain, -1):
                _refuse(f"backwards of grain {grain} are not in ascending order", schedule, [(worker, place)])
            latest[grain] = micro_batch


def _check_progress(schedule: Schedule, depth: int) -> None:
    """Runs whatever can run, without regard to time, until nothing is left or nothing moves."""
    ended: set[Action] = set()
    places = {worker: 0 for worker, actions in schedule.items() if actions}
    while places:
        runnable = [worker for worker, place in places.items() if awaited(schedule[worker][place], depth) in ended | {None}]
        if not runnable:
            _refuse("deadlock: each marked action waits for one that cannot run", schedule, list(places.items()))
        for worker in runnable:
            ended.add(schedule[worker][places[worker]])
            places[worker] += 1
            if places[worker] == len(schedule[worker]):
                del places[worker]
