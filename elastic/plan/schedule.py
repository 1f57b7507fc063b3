"""The order in which each worker runs the forwards and backwards of its micro-batches: how it is made, and what it must satisfy.

By default a worker at stage s of S holds the activations of at most S - s micro-batches (1F1B's bound), and takes forwards, and backwards,
in ascending order. `elastic.plan.policy` has the other ways, and why none of them can deadlock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from elastic.plan.actions import Action, Cell, Kind, Schedule, awaited, format, parse, refuse
from elastic.plan.plan import Stage
from elastic.plan.policy import ONE_F_ONE_B, Policy
from elastic.plan.simulation import simulate
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

__all__ = ["Action", "Kind", "Schedule", "build", "format", "open_folds", "parse", "validate"]


_WHOLE: tuple[Kind, ...] = ("F", "B")
_SPLIT: tuple[Kind, ...] = ("F", "I", "W")
_EXCLUDED: dict[Kind, tuple[Kind, ...]] = {"F": (), "B": ("I", "W"), "I": ("B",), "W": ("B",)}


def build(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    *,
    policy: Policy = ONE_F_ONE_B,
    timing: Timing | None = None,
) -> dict[int, tuple[Action, ...]]:
    """The schedule by list scheduling over simulated time; `routes[stage][grain]` is a worker. A member without a grain has no actions.

    Whenever a worker is free it runs a backward if one is ready, else a forward that is ready and within the bounds, else whatever
    becomes so first; parts of backwards for weights fill the time until then. With equal costs and equal numbers of workers, the default
    is classic 1F1B. `timing` is what is assumed of workers and links; None is the workload's own seconds, and links that take none.
    """
    return simulate(workload, stages, routes, policy=policy, timing=timing)[0]


def validate(schedule: Schedule, workload: Workload, routes: Sequence[Sequence[int]], policy: Policy = ONE_F_ONE_B) -> None:
    """Raises PlanError, which prints the schedule with the bad cells marked `>2F0<`, unless it can be run as routed.

    That is: every worker has exactly the actions routed to it, once, each backward whole or in two parts; whole backwards and parts for
    weights ascend within a grain, whose sum is a fold in that order; no more micro-batches are in flight at a worker, or held by it, than
    the policy's bounds; and the lists do not deadlock. A schedule may mix whole and split backwards.
    """
    _check_routed(schedule, workload, routes)
    in_flight, held = policy.bounds(len(routes))
    for worker, actions in schedule.items():
        _check_bounds(schedule, worker, actions, in_flight, held)
        _check_folds(schedule, worker, actions, workload)
    _check_progress(schedule, len(routes))


def _cells(schedule: Schedule) -> Iterator[tuple[Cell, Action]]:
    for worker, actions in schedule.items():
        for place, action in enumerate(actions):
            yield (worker, place), action


def _check_routed(schedule: Schedule, workload: Workload, routes: Sequence[Sequence[int]]) -> None:
    """Each micro-batch has F, and B or both I and W, once each at its worker."""
    homes = [[route[workload.grain_of(micro_batch)] for micro_batch in range(workload.micro_batches)] for route in routes]
    seen: set[Action] = set()
    for (worker, place), action in _cells(schedule):
        stage, kind, micro_batch = action
        if stage >= len(homes) or micro_batch >= workload.micro_batches:
            refuse(f"{action} is not part of the step", schedule, [(worker, place)])
        if homes[stage][micro_batch] != worker:
            refuse(f"{action} is routed to worker {homes[stage][micro_batch]}, not to {worker}", schedule, [(worker, place)])
        if action in seen:
            refuse(f"{action} is there twice", schedule, [(worker, place)])
        if seen.intersection(Action(stage, other, micro_batch) for other in _EXCLUDED[kind]):
            refuse(f"{action} is there beside the other form of that backward", schedule, [(worker, place)])
        seen.add(action)
    for stage, row in enumerate(homes):
        for micro_batch, worker in enumerate(row):
            split = Action(stage, "I", micro_batch) in seen or Action(stage, "W", micro_batch) in seen
            for kind in _SPLIT if split else _WHOLE:
                if (action := Action(stage, kind, micro_batch)) not in seen:
                    refuse(f"{action} is missing from worker {worker}", schedule)


def _check_bounds(schedule: Schedule, worker: int, actions: Sequence[Action], in_flight: Sequence[int], held: Sequence[int]) -> None:
    done: Counter[Kind] = Counter()
    for place, (stage, kind, _) in enumerate(actions):
        done[kind] += 1
        if done["F"] - done["B"] - done["I"] > in_flight[stage]:
            refuse(f"more than {in_flight[stage]} micro-batches in flight at stage {stage}", schedule, [(worker, place)])
        if done["F"] - done["B"] - done["W"] > held[stage]:
            refuse(f"the activations of more than {held[stage]} micro-batches held at stage {stage}", schedule, [(worker, place)])


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
    return not before or not ended.isdisjoint(before)


def open_folds(actions: Sequence[Action], workload: Workload) -> int:
    """The most grains at once of which a worker has folded some gradients and not all: each takes memory for one more set of gradients."""
    size = workload.micro_batches // workload.grains
    left: dict[int, int] = {}
    most = 0
    for _, kind, micro_batch in actions:
        if kind in "BW":
            grain = workload.grain_of(micro_batch)
            left[grain] = left.get(grain, size) - 1
            most = max(most, len(left))
            if not left[grain]:
                del left[grain]
    return most
