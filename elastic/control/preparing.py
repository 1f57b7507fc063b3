"""Searches plans for the loss of any one host or worker while the job runs undisturbed, in slices on the agent's thread between events.

If there is a spare, plans with it in the place of the lost worker come first; then those without a host.
A search does not depend on worker numbers, so losses that leave equal workers in the same order are one class. Links are measured all the
time. A preparation uses the links known when it begins, and proposals use the same links until the next preparation begins. So a proposal
does not depend on whether it was prepared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from elastic.plan.fleet import Fleet
from elastic.plan.planner import Answers
from elastic.plan.search import preparing
from elastic.plan.site import LinkSpeed, Pair, Site

if TYPE_CHECKING:
    from elastic.view import Member, View

SLICE_S = 0.01
"""Seconds of one slice, in which the agent handles no event.

A slice ends earlier if another step, as long as the longest so far, might exceed it.
"""

PAUSE_S = 0.03
"""Seconds between slices: the preparation takes a quarter of a processor at most."""

BUDGET_S = 4.0
"""Seconds of one preparation, summed over its slices."""

SETTLED_S = 2.0
"""Seconds from the beginning of a view until the preparation begins: by then its links have been used."""

RENEWED_S = 30.0
"""Seconds until measured links are compared again with those of the preparation."""

_CHANGE = 1.25

_FADING = 0.9
"""Factor on the longest step from slice to slice, so that the effect of an interrupted step fades."""


class Timers(Protocol):
    """The part of the event loop that `Preparing` uses."""

    def set_timer(self, seconds: float, act: Callable[[], None], name: str = "") -> None: ...
    def clear_timer(self, name: str = "") -> None: ...


class Preparing:
    """Prepares plans for the loss of one worker. `links` and `prepared` are inputs of proposals.

    `measured` returns the current links; `idle` returns whether the job runs undisturbed; `spare` returns the spare that would join next.
    """

    def __init__(
        self,
        timers: Timers,
        clock: Callable[[], float],
        stages: int | None,
        measured: Callable[[], Mapping[Pair, LinkSpeed]],
        idle: Callable[[], bool],
        spare: Callable[[], Member | None] = lambda: None,
    ) -> None:
        self.links: Mapping[Pair, LinkSpeed] = {}
        self.prepared: Answers | None = None
        self._timers, self._clock, self._stages, self._measured, self._idle = timers, clock, stages, measured, idle
        self._spare, self._with = spare, (None, None, 0, None)  # the second: what is known of the spare that the preparation counts on
        self._view: View | None = None
        self._spent_s = 0.0
        self._longest_s = SLICE_S / 2

    def begin(self, view: View) -> None:
        """Drops the preparation for the last view and schedules one for `view`."""
        self._view, self.prepared, self._spent_s = view, None, 0.0
        self._timers.set_timer(SETTLED_S, self._look, "prepare")

    def renew(self) -> None:
        """Schedules a preparation, since there is another spare."""
        if self._view is not None:
            self._timers.set_timer(SETTLED_S, self._look, "prepare")

    def close(self) -> None:
        self._timers.clear_timer("prepare")

    def _look(self) -> None:
        """Begins a preparation, unless there is one for links of about the same speed and such a spare."""
        view, links, spare = self._view, self._measured(), self._spare()
        alike = (None, None, 0, None) if spare is None else (spare.host, spare.memory, spare.base, spare.device_memory)
        known = self.prepared is not None and not _differ(links, self.links) and alike == self._with
        if view is None or not self._idle() or known:
            self._timers.set_timer(RENEWED_S, self._look, "prepare")
            return
        self.links, self._spent_s, self._with = links, 0.0, alike
        self.prepared = preparing(_left(view, view.site.knowing(links), spare), view.workload, self._stages)
        self._slice()

    def _slice(self) -> None:
        more = True
        if self._idle() and self.prepared is not None:
            began = now = self._clock()
            self._longest_s = max(_FADING * self._longest_s, SLICE_S / 2)
            while more and (now == began or now + self._longest_s < began + SLICE_S):
                more, before, now = self.prepared.advance(), now, self._clock()
                self._longest_s = max(self._longest_s, now - before)
            self._spent_s += now - began
        again = more and self._spent_s < BUDGET_S
        self._timers.set_timer(PAUSE_S if again else RENEWED_S, self._slice if again else self._look, "prepare")


def _left(view: View, site: Site, spare: Member | None) -> Iterator[Fleet]:
    """Yields what may be left after a loss: first with the spare, which joins in the attempt of the loss; then without a whole host."""
    members = view.members
    if spare is not None:
        for lost in _losses(members) or [0]:
            yield Fleet.of([*members[:lost], *members[lost + 1 :], spare], site)
    hosts = Counter(member.host for member in members)
    for host in [host for host, count in hosts.items() if 1 < count < len(members)]:
        yield Fleet.of([member for member in members if member.host != host], site)
    for lost in _losses(members):
        yield Fleet.of([*members[:lost], *members[lost + 1 :]], site)


def _losses(members: Sequence[Member]) -> list[int]:
    """Returns the places whose loss is worth preparing; none if there is one member.

    Of neighbours that are alike only the first counts, since the remaining fleet is the same.
    """
    named = [(member.host, member.slowdown, member.memory, member.base, member.device_memory) for member in members]
    return [place for place, what in enumerate(named) if place == 0 or what != named[place - 1]] if len(named) > 1 else []


def _differ(now: Mapping[Pair, LinkSpeed], before: Mapping[Pair, LinkSpeed]) -> bool:
    if now.keys() != before.keys():
        return True
    pairs = [(now[hosts], before[hosts]) for hosts in now]
    return any(max(a.bytes_per_s, b.bytes_per_s) > _CHANGE * min(a.bytes_per_s, b.bytes_per_s) for a, b in pairs)
