"""Bubbles: when and why workers are idle in a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from elastic.plan.timeline import StepTimeline

Cause = Literal["fill", "wait", "sync", "drain"]


class Gap(NamedTuple):
    """A time in which a worker is idle, in seconds since the step began."""

    start_s: float
    end_s: float
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubbles:
    """Seconds that a worker is idle: before its first action, between actions, waiting for its stage or for all, and at the end."""

    fill_s: float = 0.0
    wait_s: float = 0.0
    sync_s: float = 0.0
    drain_s: float = 0.0

    @property
    def idle_s(self) -> float:
        """All idle seconds."""
        return self.fill_s + self.wait_s + self.sync_s + self.drain_s


def gaps(timeline: StepTimeline, worker: int) -> tuple[Gap, ...]:
    """Returns all times of the step in which `worker` is idle, ascending.

    The cause is "fill" before its first forward, "wait" (for the input from another worker) before any other action, "sync" before its
    stage's synchronisation or its update, and "drain" from its last span to the end of the step.
    """
    found: list[Gap] = []
    before_s, started = 0.0, False
    for span in timeline.spans[worker]:
        if span.start_s > before_s:
            cause: Cause = "sync" if not span.computes else "wait" if started else "fill"
            found.append(Gap(before_s, span.start_s, cause))
        before_s, started = span.end_s, started or span.computes
    if timeline.end_s > before_s:
        found.append(Gap(before_s, timeline.end_s, "drain"))
    return tuple(found)


def breakdown(timeline: StepTimeline) -> dict[int, Bubbles]:
    """Returns each worker's idle seconds by cause; with its busy seconds they add up to the step."""
    return {worker: _sum(gaps(timeline, worker)) for worker in timeline.spans}


def _sum(idle: Iterable[Gap]) -> Bubbles:
    seconds: dict[Cause, float] = dict.fromkeys(get_args(Cause), 0.0)
    for start_s, end_s, cause in idle:
        seconds[cause] += end_s - start_s
    return Bubbles(fill_s=seconds["fill"], wait_s=seconds["wait"], sync_s=seconds["sync"], drain_s=seconds["drain"])


def bubble_share(timeline: StepTimeline) -> float:
    """Returns the idle time of all workers as a share of their total time, between 0 and 1."""
    whole_s = timeline.end_s * len(timeline.spans)
    return sum(each.idle_s for each in breakdown(timeline).values()) / whole_s if whole_s else 0.0
