"""Finds a small schedule that still fails: delta debugging (Zeller and Hildebrandt, 2002) over the faults. Only the trial does I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from elastic.chaos.injection import Injection
from elastic.chaos.schedule import Schedule

_AFTER_S, _AFTER_STEPS = 8.0, 60


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Returns a schedule of which no single fault can be left out, and which ends soon after its last fault, if that still fails.

    `fails(schedule)` runs one, and is called only for schedules that differ from those before. The given one is taken to fail.
    """
    tried: dict[tuple[Injection, ...], bool] = {schedule.injections: True}

    def still(injections: Sequence[Injection]) -> bool:
        key = tuple(injections)
        if key not in tried:
            tried[key] = fails(schedule.with_faults(key))
        return tried[key]

    smallest = schedule.with_faults(_minimal(schedule.injections, still))
    shorter = _shorter(smallest)
    return shorter if shorter != smallest and fails(shorter) else smallest


def _minimal(injections: tuple[Injection, ...], still: Callable[[Sequence[Injection]], bool]) -> tuple[Injection, ...]:
    """ddmin: parts, then complements of parts, ever finer."""
    if still(()):
        return ()
    parts = 2
    while len(injections) >= 2:
        size = -(-len(injections) // parts)
        pieces = [injections[at : at + size] for at in range(0, len(injections), size)]
        complements = [tuple(each for piece in (*pieces[:at], *pieces[at + 1 :]) for each in piece) for at in range(len(pieces))]
        found = next((piece for piece in [*pieces, *complements] if len(piece) < len(injections) and still(piece)), None)
        if found is not None:
            parts = 2 if len(found) <= size else max(2, parts - 1)
            injections = tuple(found)
        elif parts >= len(injections):
            break
        else:
            parts = min(len(injections), 2 * parts)
    return injections


def _shorter(schedule: Schedule) -> Schedule:
    """The same faults in a job that ends soon after the last one."""
    times = [each.time + each.lasts_s for each in schedule.injections if each.time is not None]
    steps = [each.step for each in schedule.injections if each.step is not None]
    job = schedule.job
    if job.minutes and not steps:
        minutes = min(job.minutes, round((max(times, default=0.0) + _AFTER_S) / 60, 3))
        return replace(schedule, job=replace(job, minutes=minutes))
    if job.steps and not times:
        return replace(schedule, job=replace(job, steps=min(job.steps, max(steps, default=0) + _AFTER_STEPS)))
    return schedule
