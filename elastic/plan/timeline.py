"""The timeline of a step: the result of a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from elastic.plan.actions import ActionKind

ActivityKind = Literal[ActionKind, "sync", "update"]


class Span(NamedTuple):
    """One activity of a worker, in seconds since the step began; the micro-batch is -1 if there is none."""

    start_s: float
    end_s: float
    activity: ActivityKind
    micro_batch: int = -1

    @property
    def computes(self) -> bool:
        """Whether it is a forward or a backward."""
        return self.micro_batch >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeline:
    """The workers of each stage, and the spans of each in ascending order of time: the actions of its schedule, then its update."""

    members: tuple[tuple[int, ...], ...]
    spans: Mapping[int, tuple[Span, ...]]

    @property
    def end_s(self) -> float:
        """Seconds until the last span ends."""
        return max((spans[-1].end_s for spans in self.spans.values() if spans), default=0.0)
