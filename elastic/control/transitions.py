"""Parts shared by transitions of the state machine: ending, closing, evicting, starting new workers. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from elastic.control import spares
from elastic.control.events import ControlAction, EndJob, Evict, Respawn, Tell
from elastic.control.state import ControlState, Phase, Suspicion
from elastic.view import outlives

SUSPICION_S = 1.0  # how long the death of a lost peer is awaited before the peer is evicted
GATHERING_S = 0.05  # how long a joiner waits for those that were started with it
CLOSING_S = 1.0  # how long the others may take to finish when one died at the end of the training
FAILED_JOINS = 3  # so many new workers may die before a step is committed with them; then none are started for a while
JOIN_PAUSE_S, LONGEST_JOIN_PAUSE_S = 30.0, 600.0  # the first time; twice as long each time after that

Transition = tuple[ControlState, list[ControlAction]]
"""The next state, and the actions to execute."""


def without_attempt(state: ControlState) -> ControlState:
    """Clears the answers of members to an attempt or to a request for a boundary."""
    return replace(state, participants=frozenset(), paused={}, inventories={}, proposal=None, votes={}, suspects={}, retry=None)


def end_job(state: ControlState, kind: str, message: str, *, closing: bool = False) -> Transition:
    """Ends the job with an error of class `kind`."""
    over = replace(
        state,
        phase=Phase.ENDED,
        start_at=None,
        joins_from=None,
        join_at=None,
        close_at=None,
        nag_at=None,
        return_at=None,
        suspects={},
        retry=None,
    )
    return over, [EndJob(kind=kind, message=message, closing=closing)]


def followed_by(first: list[ControlAction], rest: Transition) -> Transition:
    """Returns the transition `rest` with the actions `first` in front."""
    return rest[0], [*first, *rest[1]]


def replenished(state: ControlState, *, recovering: bool = False, awaited: bool = False) -> Transition:
    """Starts as many workers and spares as are missing, unless respawn is off or has failed too often.

    A new worker takes processor time from a recovery. So it is started when the recovery's first step is committed, or soon if steps are
    long, unless the recovery waits for new workers; `awaited`: it waits for as many as are missing. Then no spares are started.
    """
    if recovering and len(state.live) + len(spares.joiners(state, at_boundary=False)) >= state.least:
        return state, []
    none = recovering or awaited
    present = spares.able(state) if none else state.ready
    missing = spares.missing(state) - len(present) - len(state.starting)
    missing += 0 if none or state.spares_from is not None else state.policy.spares
    if not respawns(state) or missing <= 0 or not (state.live or state.fallen or outlives(state.view.members)):
        return state, []
    numbers = tuple(range(state.next_worker, state.next_worker + missing))
    started = replace(state, starting=state.starting | set(numbers), next_worker=state.next_worker + missing)
    return started, [Respawn(workers=numbers)]


def dismissing(state: ControlState) -> Transition:
    """Ends the ready workers that nobody needs; those that stay, if no member is missing, are spares."""
    surplus = spares.superfluous(state) if respawns(state) else ()
    ready = {worker: member for worker, member in state.ready.items() if worker not in surplus}
    waiting = frozenset(ready) if spares.missing(state) <= 0 else state.spares.intersection(ready)
    state = replace(state, ready=ready, spares=waiting, unable=state.unable.intersection(ready))
    why = "others have joined in its place, and no spare is missing"
    return state, [Evict(worker=worker, why=why) for worker in surplus]


def failed_join(state: ControlState, worker: int, now: float) -> Transition:
    """Counts the death of a new worker; workers that run together count once, since they may be killed together, from outside.

    After `FAILED_JOINS` of them none are started for a while, and then after each one more, until a step is committed with a new one.
    """
    if worker < state.failed_below:
        return state, []
    state = replace(state, failed_joins=state.failed_joins + 1, failed_below=state.next_worker)
    if not state.policy.respawn or state.failed_joins != FAILED_JOINS:
        return state, []
    pause_s = min(JOIN_PAUSE_S * 2 ** min(state.join_pauses, 10), LONGEST_JOIN_PAUSE_S)  # a power of 1,024 is no float any more
    many = "another new worker has" if state.join_pauses else f"{FAILED_JOINS} new workers have"
    why = f"{many} died before a step was committed with new ones: no more are started for {pause_s:g} s"
    return replace(state, joins_from=now + pause_s, join_pauses=state.join_pauses + 1), [Tell(sentence=why)]


def respawns(state: ControlState) -> bool:
    """Whether new workers may be started now."""
    return state.policy.respawn and not state.stopping and not state.finished and state.failed_joins < FAILED_JOINS


def suspected(state: ControlState, reporter: int, peer: int, now: float) -> ControlState:
    if peer in state.evicted:
        return state
    known = state.suspects.get(peer, Suspicion(due=now + SUSPICION_S, reporters=frozenset()))
    return replace(state, suspects={**state.suspects, peer: replace(known, reporters=known.reporters | {reporter})})


def without(suspects: Mapping[int, Suspicion], worker: int) -> dict[int, Suspicion]:
    """Returns the suspicions without `worker`, also as a reporter: of two workers that lost each other, only one is evicted."""
    rest = {peer: replace(known, reporters=known.reporters - {worker}) for peer, known in suspects.items() if peer != worker}
    return {peer: known for peer, known in rest.items() if known.reporters}


def evict(state: ControlState, worker: int, why: str) -> Transition:
    """Asks for the worker to be killed; its death is handled as any other."""
    if worker in state.evicted:
        return state, []
    state = replace(state, evicted=state.evicted | {worker}, suspects=without(state.suspects, worker))
    return state, [Evict(worker=worker, why=why)]


def gathering(state: ControlState, now: float) -> ControlState:
    """Sets the time at which ready workers join."""
    state = spares.returning(state)
    if not (spares.joiners(state, at_boundary=True) or state.leaving) or state.stopping or state.finished:
        return replace(state, join_at=None)
    if not state.starting:
        return replace(state, join_at=now)
    return replace(state, join_at=now + GATHERING_S if state.join_at is None else state.join_at)


def close_job(state: ControlState, now: float) -> Transition:
    """Waits CLOSING_S for the others to finish as well, since with a finished member there is no next view."""
    if state.phase is Phase.CLOSING:
        return state, []
    cause = state.cause or "a worker finished while the members of the job were changing"
    return replace(
        state, phase=Phase.CLOSING, cause=cause, close_at=now + CLOSING_S, join_at=None, nag_at=None, suspects={}, retry=None
    ), []
