"""Figures of a run: goodput against what the surviving capacity allows, stalls by kind of fault, and tokens per second. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic.chaos.evidence import Evidence
from elastic.chaos.oracles.ending import gaps, near

_ENOUGH = 8
_STALL_OF_STEPS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Committed steps, and those that the members of each moment could have made in the same time, without any fault.

    `rates` has steps per second by number of members, the median of quiet steps. What fewer members could make is at least their share of
    what most of them make: they are as fast as that on processors of their own, also if others that start take the processors.
    """

    steps: int
    seconds: float
    possible: float
    rates: Mapping[int, float]

    @property
    def share(self) -> float:
        """Steps of what was possible, from 0 to 1."""
        return min(1.0, self.steps / self.possible) if self.possible else 0.0


def goodput(evidence: Evidence) -> Goodput | None:
    """The goodput from the first step to the last; None with fewer than two steps."""
    found, steps = gaps(evidence), evidence.steps
    if not found:
        return None
    rates = _rates(evidence)
    begin, end = found[0][0], found[-1][1]
    changes = _members(evidence)
    most = max((members for _, members in changes), default=1)
    full = rates.get(most) or 1 / statistics.median(each[1] - each[0] for each in found)
    possible, members, at = 0.0, most, begin
    for when, count in [*changes, (end, 0)]:
        until = min(max(when, begin), end)
        share = min(members, evidence.processors) / min(most, evidence.processors)
        possible += (until - at) * max(rates.get(members, 0.0), full * share)
        at, members = until, count
    return Goodput(steps=len(steps), seconds=end - begin, possible=possible, rates=rates)


def _members(evidence: Evidence) -> list[tuple[float, int]]:
    """When the number of members changed, and to what: a host that hears of a view later than another one does not bring it back."""
    found, newest = list[tuple[float, int]](), (0, 0)
    began = [run[0].began for run in evidence.runs]  # a job that is started again counts its views anew
    for at, _, epoch, workers in sorted(evidence.seen.views):
        view = sum(each <= at for each in began), epoch
        if view > newest:
            found.append((at, len(workers)))
            newest = view
    return found


def _rates(evidence: Evidence) -> dict[int, float]:
    """Steps per second by number of members, of steps that no fault was near to."""
    by: dict[int, list[float]] = {}
    for begin, end, step in gaps(evidence):
        if not near(evidence, begin, end):
            by.setdefault(evidence.steps[step].workers, []).append(end - begin)
    return {members: 1 / statistics.median(times) for members, times in by.items() if len(times) >= _ENOUGH}


def stalls(evidence: Evidence) -> list[dict[str, Any]]:
    """Each time between two steps that is longer than three usual ones: the seconds beyond a usual step, and the faults near to it."""
    found = gaps(evidence)
    if not found:
        return []
    usual = statistics.median(end - begin for begin, end, _ in found)
    long = [(begin, end, step) for begin, end, step in found if end - begin > _STALL_OF_STEPS * usual]
    return [
        {
            "at": begin - evidence.began,
            "step": step,
            "seconds": end - begin - usual,
            "kinds": sorted({effect.injection.kind for effect in near(evidence, begin, end)}),
        }
        for begin, end, step in long
    ]


def speed(evidence: Evidence, points: int = 160) -> list[dict[str, float]]:
    """Steps and tokens per second over time, in at most so many intervals, each of five usual steps or more."""
    found, steps = gaps(evidence), evidence.steps
    if not found:
        return []
    begin, end = found[0][0], found[-1][1]
    usual = statistics.median(end - begin for begin, end, _ in found)
    width = max((end - begin) / points, 5 * usual)
    counts: dict[int, int] = {}
    for _, at, _ in found:
        counts[int((at - begin) / width)] = counts.get(int((at - begin) / width), 0) + 1
    tokens = statistics.median(each.tokens_per_second for each in steps.values())
    each = tokens * usual
    return [
        {
            "at": begin - evidence.began + index * width,
            "steps_per_s": counts.get(index, 0) / width,
            "tokens_per_s": each * counts.get(index, 0) / width,
        }
        for index in range(int((end - begin) / width) + 1)
    ]
