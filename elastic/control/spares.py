"""Who joins when members are missing, and who moves to a host that has room again. Pure.

A *spare* is a worker that was ready when no member was missing. It waits, with its model built and its layers run once, and joins in the
same attempt as a loss. Any other new worker joins at a step boundary. On several hosts a spare joins on the host with most room, so a
worker is replaced on its own host where that is possible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from elastic.control.state import ControlState

if TYPE_CHECKING:
    from elastic.view import Member

DEATHS = 3
"""So many spares may die within `FORGIVEN_S`; then none are started until the first of these deaths is so long ago."""

FORGIVEN_S = 600.0


def staying(state: ControlState) -> tuple[int, ...]:
    """Returns the live members that are not about to leave."""
    return tuple(worker for worker in state.live if worker not in state.leaving)


def missing(state: ControlState) -> int:
    """Returns how many members are missing; below 0 if there are too many."""
    return state.policy.workers - len(staying(state))


def able(state: ControlState) -> tuple[int, ...]:
    """Returns the ready workers that can join now: none that is stopped, silent or about to be ended."""
    return tuple(sorted(state.ready.keys() - state.unable - state.evicted))


def joiners(state: ControlState, *, at_boundary: bool) -> tuple[int, ...]:
    """Returns the ready workers that join in an attempt that is opened now; `at_boundary`: not only spares.

    A job that is stopping gets none, unless it would be too small.
    """
    if state.stopping and len(state.live) >= state.least:
        return ()
    candidates = [worker for worker in able(state) if at_boundary or worker in state.spares]
    return _by_room(state, candidates, missing(state))


def as_spare(state: ControlState, worker: int) -> ControlState:
    """Makes a worker that has just become ready a spare, if the members that are missing are replaced by others."""
    others = [other for other in able(state) if other != worker]
    return replace(state, spares=state.spares | {worker}) if missing(state) <= len(others) else state


def superfluous(state: ControlState) -> tuple[int, ...]:
    """Returns the ready workers that nobody needs, as members or as spares: more were started while some could not join, and now can.

    Those that cannot join now are named first, then those that are not spares yet, then the youngest.
    """
    many = len(state.ready.keys() - state.evicted) + len(state.starting) - max(0, missing(state)) - state.policy.spares
    order = sorted(state.ready.keys() - state.evicted, key=lambda worker: (worker not in state.unable, worker in state.spares, -worker))
    return tuple(order[: max(0, many)])


def returning(state: ControlState) -> ControlState:
    """Makes members leave hosts that have more of them than room, where spares of hosts with room can take their places."""
    rooms = state.policy.rooms
    if state.stopping or state.finished or len(rooms) < 2:
        return state
    hosts = {member.worker: member.host for member in state.view.members}
    at = Counter(hosts[worker] for worker in staying(state))
    free = _free(state)
    surplus = [worker for worker in reversed(staying(state)) if at[hosts[worker]] > rooms.get(hosts[worker], 0)]
    leaving: dict[int, str] = {}
    for spare in able(state)[max(0, missing(state)) :]:
        host = state.ready[spare].host
        worker = next((each for each in surplus if each not in leaving and at[hosts[each]] > rooms.get(hosts[each], 0)), None)
        if worker is not None and free.get(host, 0) > 0:
            free[host] -= 1
            at[hosts[worker]] -= 1
            leaving[worker] = f"host {host} has room for a worker again, and {hosts[worker]} had one more than its own"
    return replace(state, leaving={**state.leaving, **leaving}) if leaving else state


def died(state: ControlState, worker: int, member: Member, now: float) -> ControlState:
    """Counts the death of a spare that waited. After too many within a short time no spares are started for a while.

    Spares that ran together count once, since they may be killed together, from outside. Those of hosts that are gone do not count.
    """
    gone = bool(state.policy.rooms) and member.host not in state.policy.rooms
    if gone or (state.spare_deaths and worker < state.spare_deaths[-1][1]):
        return state
    recent = (*(death for death in state.spare_deaths if now - death[0] < FORGIVEN_S), (now, state.next_worker))
    return replace(state, spare_deaths=recent, spares_from=recent[0][0] + FORGIVEN_S if len(recent) >= DEATHS else None)


def _free(state: ControlState) -> Counter[str]:
    """Returns how many more members each host has room for; below 0 if it has more than that."""
    free = Counter(state.policy.rooms)
    hosts = {member.worker: member.host for member in state.view.members}
    free.subtract(hosts[worker] for worker in staying(state))
    return free


def _by_room(state: ControlState, candidates: Iterable[int], count: int) -> tuple[int, ...]:
    """Returns `count` of these ready workers, or all if they are fewer: each on the host that then has most room."""
    left, chosen = sorted(candidates), list[int]()
    if not state.policy.rooms:
        return tuple(left[: max(0, count)])
    free = _free(state)
    while left and len(chosen) < count:
        best = max(left, key=lambda worker: (free[state.ready[worker].host], -worker))
        free[state.ready[best].host] -= 1
        left.remove(best)
        chosen.append(best)
    return tuple(sorted(chosen))
