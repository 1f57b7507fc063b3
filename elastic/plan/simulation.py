"""A discrete-event simulation of one step. It makes the schedule, and determines how long a plan takes.

A worker runs its actions one after the other, each as soon as its input has arrived. A link carries one message at a time, in the order
in which they are sent, while both its ends compute on; different links do not slow each other down. When all members of a stage have ended
their last action the stage synchronises its gradients, and then each member updates. Members of a stage whose synchronisation takes no
time do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

from elastic.plan.actions import Action
from elastic.plan.plan import Stage
from elastic.plan.scheduling import Scheduler
from elastic.plan.slicing import finish
from elastic.plan.timeline import Span, StepTimeline
from elastic.plan.timing import Timing
from elastic.plan.workload import Workload

WAITS = 0.02
"""The share by which a step may be longer than it is at least before another order is tried."""


class Simulated(NamedTuple):
    """The seconds of a simulated step until its last action ends, and those that it takes at least in any order."""

    seconds: float
    least_s: float


def simulate(
    workload: Workload,
    stages: Sequence[Stage],
    routes: Sequence[Sequence[int]],
    timing: Timing | None = None,
    *,
    split: bool = False,
    dealt: bool = False,
    eager: int = 0,
) -> tuple[dict[int, tuple[Action, ...]], float]:
    """Returns the schedule (see `elastic.plan.schedule.build`), and the seconds until its last action ends."""
    scheduler, seconds = finish(_best(workload, routes, timing or Timing.of(workload, stages), split, dealt, eager))
    return {worker: state.actions for worker, state in scheduler.workers.items()}, seconds


def simulating(
    workload: Workload, routes: Sequence[Sequence[int]], timing: Timing, *, dealt: bool = False
) -> Generator[None, None, Simulated]:
    """Simulates a step whose backwards are whole; yields every few milliseconds."""
    yield
    scheduler, seconds = yield from _best(workload, routes, timing, split=False, dealt=dealt)
    return Simulated(seconds, scheduler.least_s)


def _best(
    workload: Workload, routes: Sequence[Sequence[int]], timing: Timing, split: bool, dealt: bool, eager: int = 0
) -> Generator[None, None, tuple[Scheduler, float]]:
    """Runs the step; if that takes longer than it must, also with patient workers. Returns the faster run, and its seconds.

    An eager step is that of patient workers, unless they would wait for each other for ever.
    """
    if eager:
        ahead = Scheduler(workload, routes, timing, patient=True, dealt=dealt, eager=eager)
        ahead_s = yield from ahead.running()
        if ahead.complete:
            return ahead, ahead_s
    scheduler = Scheduler(workload, routes, timing, split=split, dealt=dealt)
    seconds = yield from scheduler.running()
    if not split and seconds > (1 + WAITS) * scheduler.least_s:
        patient = Scheduler(workload, routes, timing, patient=True, dealt=dealt)
        patient_s = yield from patient.running()
        if patient.complete and patient_s < seconds:
            return patient, patient_s
    return scheduler, seconds


def judge(
    workload: Workload, stages: Sequence[Stage], routes: Sequence[Sequence[int]], timing: Timing | None = None, *, split: bool = False
) -> StepTimeline:
    """Returns the timeline of a plan's whole step: actions, synchronisation and updates."""
    timing = timing or Timing.of(workload, stages)
    scheduler, _ = finish(_best(workload, routes, timing, split, dealt=False))
    spans: dict[int, list[Span]] = {}
    for number, state in scheduler.workers.items():
        pace = timing.paces[number]
        took_s = {"F": pace.forward_s, "B": pace.backward_s, "I": pace.input_s, "W": pace.weight_s}
        spans[number] = [
            Span(start_s, start_s + took_s[kind], kind, micro_batch)
            for (_, kind, micro_batch), start_s in zip(state.actions, state.starts, strict=True)
        ]
    free = {worker: state.free for worker, state in scheduler.workers.items()}
    for group, sync_s in zip(timing.members, timing.sync_s, strict=True):
        start_s = max(free[worker] for worker in group)
        for worker in group:
            if sync_s:
                spans[worker].append(Span(start_s, start_s + sync_s, "sync"))
                free[worker] = start_s + sync_s
            if update_s := timing.paces[worker].update_s:
                spans[worker].append(Span(free[worker], free[worker] + update_s, "update"))
    return StepTimeline(members=timing.members, spans={worker: tuple(each) for worker, each in spans.items()})
