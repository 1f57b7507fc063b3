"""An oracle that checks whether a schedule can run. It does not use the code that makes schedules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NoReturn

from elastic.errors import PlanError
from elastic.plan.actions import Action, ActionKind, Cell, Schedule, format
from elastic.plan.workload import Workload


def awaited(action: Action, depth: int) -> Action | None:
    """The action that must end before `action` can start, usually on another worker; `depth` is the number of stages."""
    stage, kind, micro_batch = action
    if kind == "F":
        return Action(stage - 1, "F", micro_batch) if stage else None
    if kind == "W":
        return Action(stage, "I", micro_batch)
    return Action(stage, "F", micro_batch) if stage == depth - 1 else Action(stage + 1, "B", micro_batch)


def refuse(why: str, schedule: Schedule, marked: Collection[Cell] = ()) -> NoReturn:
    """Raises PlanError that says why and prints the schedule with the cells marked."""
    raise PlanError(f"{why}:\n{format(schedule, marked)}")


def validate(schedule: Schedule, workload: Workload, routes: Sequence[Sequence[int]], *, dealt: bool = False, eager: int = 0) -> None:
    """Raises PlanError, which prints the schedule with the bad cells marked `>2F0<`, unless it can be run as routed.

    That is: every worker has exactly the actions routed to it, once; backwards ascend within a grain, whose sum is a fold in that order;
    no more micro-batches are in flight at a worker than 1F1B's bound, or if they are `dealt` out the workers from its stage on for each of
    its stage, or one more where backwards are split in I and W, or below the last stage if the schedule is `eager`; and the lists do not
    deadlock.
    """
    _check_routed(schedule, workload, routes)
    for worker, actions in schedule.items():
        _check_bound(schedule, worker, actions, [len(set(route)) for route in routes], dealt=dealt, eager=eager)
        _check_folds(schedule, worker, actions, workload)
    _check_progress(schedule, len(routes))


def _cells(schedule: Schedule) -> Iterator[tuple[Cell, Action]]:
    for worker, actions in schedule.items():
        for place, action in enumerate(actions):
            yield (worker, place), action


def _check_routed(schedule: Schedule, workload: Workload, routes: Sequence[Sequence[int]]) -> None:
    homes = [[route[workload.grain_of(micro_batch)] for micro_batch in range(workload.micro_batches)] for route in routes]
    seen: set[Action] = set()
    for (worker, place), action in _cells(schedule):
        stage, _, micro_batch = action
        if stage >= len(homes) or micro_batch >= workload.micro_batches:
            refuse(f"{action} is not part of the step", schedule, [(worker, place)])
        if homes[stage][micro_batch] != worker:
            refuse(f"{action} is routed to worker {homes[stage][micro_batch]}, not to {worker}", schedule, [(worker, place)])
        if action in seen:
            refuse(f"{action} is there twice", schedule, [(worker, place)])
        seen.add(action)
    for stage, row in enumerate(homes):
        for micro_batch, worker in enumerate(row):
            for kind in _kinds(schedule[worker]):
                if (action := Action(stage, kind, micro_batch)) not in seen:
                    refuse(f"{action} is missing from worker {worker}", schedule)


def _kinds(actions: Sequence[Action]) -> tuple[ActionKind, ...]:
    return ("F", "I", "W") if any(action.kind in "IW" for action in actions) else ("F", "B")


def _check_bound(schedule: Schedule, worker: int, actions: Sequence[Action], widths: Sequence[int], *, dealt: bool, eager: int) -> None:
    done: Counter[ActionKind] = Counter()
    last = _kinds(actions)[-1]
    for place, (stage, kind, _) in enumerate(actions):
        done[kind] += 1
        around = math.ceil(sum(widths[stage:]) / widths[stage]) if dealt else 0
        bound = max(len(widths) - stage, around) + (last == "W") + min(eager, len(widths) - 1 - stage)
        if done["F"] - done[last] > bound:
            refuse(f"more than {bound} micro-batches in flight at stage {stage}", schedule, [(worker, place)])


def _check_folds(schedule: Schedule, worker: int, actions: Sequence[Action], workload: Workload) -> None:
    latest: dict[int, int] = {}
    for place, (_, kind, micro_batch) in enumerate(actions):
        if kind in "BW":
            grain = workload.grain_of(micro_batch)
            if micro_batch < latest.get(grain, -1):
                refuse(f"backwards of grain {grain} are not in ascending order", schedule, [(worker, place)])
            latest[grain] = micro_batch


def _check_progress(schedule: Schedule, depth: int) -> None:
    """Runs whatever can run, without regard to time, until nothing is left or nothing moves."""
    ended: set[Action] = set()
    places = {worker: 0 for worker, actions in schedule.items() if actions}
    while places:
        runnable = [worker for worker, place in places.items() if _can_run(schedule[worker][place], ended, depth)]
        if not runnable:
            refuse("deadlock: each marked action waits for one that cannot run", schedule, list(places.items()))
        for worker in runnable:
            ended.add(schedule[worker][places[worker]])
            places[worker] += 1
            if places[worker] == len(schedule[worker]):
                del places[worker]


def _can_run(action: Action, ended: set[Action], depth: int) -> bool:
    before = awaited(action, depth)
    return before is None or before in ended or (before.kind == "B" and before._replace(kind="I") in ended)
