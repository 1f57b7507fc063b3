"""The state machine that changes the members of a job. It decides purely: an event and the time go in, the next state and actions come out.

    RUNNING -> BOUNDARY -> QUIESCING -> PROPOSING -> MIGRATING -> COMMITTING -> RUNNING
       |   planned change      ^             |            |           |
       +------- death ---------+<------------+---death, refusal-------+     the next attempt, from the last committed view
                               |
                            PAUSED   fewer workers than the job may shrink to: waits for joiners

An attempt is identified by (epoch, attempt); events with another id are stale and ignored. Once a commit is under way the attempt cannot be
abandoned: the commit may have happened. A death is then recorded, and handled once the outcome is known, from the view that is valid then.
Worker ids are never used again, so the set of the dead only grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from elastic.control import spares
from elastic.control.attempt import (
    PATIENCE_S,
    SETTLING_S,
    attempt_failed,
    commit_failed,
    committed,
    inventoried,
    open_attempt,
    proposed,
    unproposable,
    unreadable,
    voted,
)
from elastic.control.events import (
    AskBoundary,
    CommitFailed,
    Committed,
    ControlAction,
    Draining,
    Event,
    FirstCommit,
    Inventoried,
    JoinerReady,
    LostLink,
    PausedAt,
    Proposed,
    Reopened,
    Room,
    Stopping,
    Tell,
    Timeout,
    Unable,
    Unbalanced,
    Unproposable,
    Unresponsive,
    Voted,
    WorkerDied,
    WorkerFinished,
)
from elastic.control.input_blame import blamed, does_not_fit
from elastic.control.state import ATTEMPTING, ControlState, JobPolicy, Phase, Resumed, Retry
from elastic.control.transitions import (
    FAILED_JOINS,
    SUSPICION_S,
    Transition,
    close_job,
    dismissing,
    end_job,
    evict,
    failed_join,
    followed_by,
    gathering,
    replenished,
    suspected,
    without,
)

if TYPE_CHECKING:
    from elastic.view import View

LOSSES_KEPT = 100


def running(view: View, policy: JobPolicy, now: float = 0.0) -> ControlState:
    """Returns the state of a job whose first view is committed. Spares are started when its first step is, or soon if steps are long."""
    start_at = now + SETTLING_S if policy.spares else None
    return ControlState(policy=policy, view=view, next_worker=max(view.workers) + 1, start_at=start_at)


def resumed(view: View, policy: JobPolicy, known: Resumed, now: float = 0.0) -> ControlState:
    """Returns the state of a job that another agent has coordinated until now."""
    epoch, attempt = known.attempt_id
    state = running(view, policy, now)
    number = max(state.next_worker, known.next_worker)
    return replace(state, next_worker=number, attempt=attempt if epoch > view.epoch else 0, starting=known.spares)


def step(state: ControlState, event: Event, now: float) -> Transition:
    """Returns the state after `event` at the time `now` (monotonic seconds), and the actions to execute."""
    if state.phase is Phase.ENDED:
        return state, []
    return _HANDLERS[type(event)](state, event, now)


def _died(state: ControlState, event: WorkerDied, now: float) -> Transition:
    worker = event.worker
    if worker in state.dead:
        return state, []
    known, waited = state.starting | state.ready.keys(), worker in state.spares and worker not in state.participants
    member = state.ready.get(worker)
    state = replace(
        state,
        spares=state.spares - {worker},
        unable=state.unable - {worker},
        dead=state.dead | {worker},
        evicted=state.evicted - {worker},
        starting=state.starting - {worker},
        ready={other: member for other, member in state.ready.items() if other != worker},
        suspects=without(state.suspects, worker),
    )
    if worker in state.view.workers:
        return _member_died(state, event, now)
    if waited and member is not None:
        return _spare_died(spares.died(state, worker, member, now), event, state.spares_from, now)
    if worker in known:
        return _joiner_died(state, event, now)
    return state, []


def _member_died(state: ControlState, event: WorkerDied, now: float) -> Transition:
    worker = event.worker
    if worker in state.finished:
        return state, []
    state, failures = failed_join(state, worker, now) if worker in state.newcomers else (state, [])
    state = replace(state, cause=event.how)
    if state.finished:
        return close_job(state, now)
    if event.loss is not None:
        state = replace(state, losses=(*state.losses[-LOSSES_KEPT:], event.loss))
        if (why := blamed(state.losses) or does_not_fit(state.losses)) is not None:
            return end_job(state, "JobFailed", f"{why}; the last of them: {event.how}")
    state, actions = replenished(state, recovering=True)
    told: list[ControlAction] = [Tell(sentence=event.how), *failures, *actions]
    # The view that is being committed may be committed already.
    return (state, told) if state.phase is Phase.COMMITTING or event.more else followed_by(told, open_attempt(state, now))


def _spare_died(state: ControlState, event: WorkerDied, before: float | None, now: float) -> Transition:
    """Replaces a spare that is lost; `before`: until when no spares were started before."""
    told: list[ControlAction] = [Tell(sentence=f"{event.how}; it was a spare, and the training goes on")]
    if state.policy.respawn and before is None and state.spares_from is not None:
        often = f"{spares.DEATHS} spares have died within {spares.FORGIVEN_S / 60:g} minutes"
        told.append(Tell(sentence=f"{often}: no others are started for {state.spares_from - now:.0f} s. The system may be out of memory"))
    return followed_by(told, replenished(state, recovering=state.phase in (*ATTEMPTING, Phase.COMMITTING)))


def _joiner_died(state: ControlState, event: WorkerDied, now: float) -> Transition:
    state, failures = failed_join(state, event.worker, now)
    state, actions = replenished(state, recovering=state.phase in (*ATTEMPTING, Phase.COMMITTING))
    told: list[ControlAction] = [Tell(sentence=f"{event.how}, before it had joined"), *failures, *actions]
    if state.phase is Phase.PAUSED or (state.phase in ATTEMPTING and event.worker in state.participants):
        return followed_by(told, open_attempt(state, now))
    return state, told


def _lost(state: ControlState, event: LostLink, now: float) -> Transition:
    """Handles a lost link. During an attempt it is ignored: links are dropped on purpose then, and votes report those that are needed."""
    if event.damaged:
        return _damaged(state, event, now)
    if state.phase not in (Phase.RUNNING, Phase.BOUNDARY) or event.epoch != state.view.epoch or not state.lives(event.reporter):
        return state, []
    if event.unreadable:
        return followed_by([Tell(sentence=unreadable(event.reporter, event.reason))], open_attempt(state, now))
    if event.peer is None or event.peer not in state.view.workers:  # one that is no member any more explains nothing either
        why = f"worker {event.reporter} cannot go on: {event.reason}"
        return replace(state, retry=state.retry or Retry(due=now + SUSPICION_S, why=why)), []
    if not state.lives(event.peer) or event.reporter == event.peer:
        return state, []
    if event.peer in state.finished:
        cause = state.cause or f"worker {event.reporter} lost worker {event.peer}, which had finished"
        return close_job(replace(state, cause=cause), now)
    return suspected(state, event.reporter, event.peer, now), []


def _damaged(state: ControlState, event: LostLink, now: float) -> Transition:
    """Opens an attempt without the copies that the reporter has discarded. During an attempt this report precedes its inventory."""
    if event.epoch != state.view.epoch or not state.lives(event.reporter):
        return state, []
    if state.finished:
        return close_job(replace(state, cause=event.reason), now)
    state = replace(state, damaged=state.damaged | {event.reporter}, cause=event.reason)
    told: list[ControlAction] = [Tell(sentence=event.reason)]
    return followed_by(told, open_attempt(state, now)) if state.phase in (Phase.RUNNING, Phase.BOUNDARY, *ATTEMPTING) else (state, told)


def _judge(state: ControlState, now: float) -> Transition:
    """Evicts the worker that most peers have lost; among equals the one with the highest number."""
    worker = max(state.suspects, key=lambda peer: (len(state.suspects[peer].reporters), peer))
    reporters = ", ".join(map(str, sorted(state.suspects[worker].reporters)))
    return evict(state, worker, f"workers [{reporters}] lost their links to it, and its process still runs after {SUSPICION_S:g} s")


def _joiner_ready(state: ControlState, event: JoinerReady, now: float) -> Transition:
    if event.worker not in state.starting or event.worker in state.evicted:
        return state, []
    state = replace(state, starting=state.starting - {event.worker}, ready={**state.ready, event.worker: event.member})
    state = spares.as_spare(state, event.worker)
    if state.phase is Phase.PAUSED:
        return open_attempt(state, now)
    return (gathering(state, now) if state.phase is Phase.RUNNING else state), []


def _ask_boundary(state: ControlState, now: float) -> Transition:
    state = replace(state, join_at=None)
    if not (spares.joiners(state, at_boundary=True) or state.leaving):
        return state, []
    return _boundary(state, now)


def _unbalanced(state: ControlState, event: Unbalanced, now: float) -> Transition:
    """Asks for a boundary at which the members change their plan; ready workers join at the same time."""
    return _boundary(replace(state, slowdowns=dict(event.slowdowns)), now)


def _unresponsive(state: ControlState, event: Unresponsive, now: float) -> Transition:
    """Evicts a worker that the others wait for, or a new one that is not ready; nobody waits for one that has finished."""
    awaited = {*state.live, *state.participants, *state.starting, *state.ready}.difference(state.finished)
    return evict(state, event.worker, event.why) if event.worker in awaited else (state, [])


def _room(state: ControlState, event: Room, now: float) -> Transition:
    """Changes the wanted number of workers: spares join, and new ones are started, also while the job is paused for want of them."""
    state = replace(state, policy=replace(state.policy, workers=event.workers, spares=event.spares, rooms=event.rooms))
    if state.phase is Phase.RUNNING:
        state = gathering(state, now)
    return replenished(state, recovering=state.start_at is not None or state.phase in (*ATTEMPTING, Phase.COMMITTING))


def _unable(state: ControlState, event: Unable, now: float) -> Transition:
    state = replace(state, unable=event.workers.intersection(state.ready))
    return (gathering(state, now) if state.phase is Phase.RUNNING else state), []


def _draining(state: ControlState, event: Draining, now: float) -> Transition:
    """Asks for a boundary at which these workers leave; an attempt that is under way leaves them out, or is followed by another change."""
    state = replace(state, leaving={**state.leaving, **dict.fromkeys(event.workers, event.why)})
    return _boundary(state, now)


def _reopened(state: ControlState, event: Reopened, now: float) -> Transition:
    """Opens an attempt, if the view has no other reason for one. Once a worker has finished there are none: only if one was under way, the
    others may wait for its end."""
    if state.finished:
        return close_job(state, now) if state.attempt else (state, [])
    returned = state.phase is Phase.PAUSED and state.return_at is not None
    return open_attempt(state, now) if returned or state.phase is Phase.RUNNING else (state, [])


def _boundary(state: ControlState, now: float) -> Transition:
    if state.phase is not Phase.RUNNING or state.stopping or state.finished:
        return state, []
    return replace(state, phase=Phase.BOUNDARY, paused={}, join_at=None, nag_at=now + PATIENCE_S), [AskBoundary(workers=state.live)]


def _paused_at(state: ControlState, event: PausedAt, now: float) -> Transition:
    """Records a paused member; opens the attempt once all have paused. They may pause at different steps: inventories resolve that."""
    if state.phase is not Phase.BOUNDARY or event.epoch != state.view.epoch or not state.lives(event.worker):
        return state, []
    state = replace(state, paused={**state.paused, event.worker: event.step})
    return (state, []) if state.waits else open_attempt(state, now, joining=True)


def _first_commit(state: ControlState, event: FirstCommit, now: float) -> Transition:
    if event.epoch != state.view.epoch or state.attempt:
        return state, []
    if state.newcomers:
        state = replace(state, newcomers=frozenset(), failed_joins=0, joins_from=None, join_pauses=0)
    state, dismissed = dismissing(replace(state, last_tries=0, start_at=None))
    return followed_by(dismissed, replenished(state))


def _has_finished(state: ControlState, event: WorkerFinished, now: float) -> Transition:
    if not state.lives(event.worker):
        return state, []
    state = replace(state, finished=state.finished | {event.worker}, join_at=None)
    if state.phase is Phase.BOUNDARY:  # the training ended before the boundary
        return replace(state, phase=Phase.RUNNING, paused={}, nag_at=None), []
    if state.phase in (*ATTEMPTING, Phase.PAUSED):
        return close_job(state, now)
    return state, []


def _stop(state: ControlState, event: Stopping, now: float) -> Transition:
    state = replace(state, stopping=True, join_at=None)
    return open_attempt(state, now) if state.phase is Phase.PAUSED else (state, [])


def _timeout(state: ControlState, event: Timeout, now: float) -> Transition:
    if state.close_at is not None and now >= state.close_at:
        return end_job(state, "JobFailed", state.cause, closing=True)
    actions: list[ControlAction] = []
    if state.nag_at is not None and now >= state.nag_at:
        actions.append(Tell(sentence=f"waiting for workers {list(state.missing)} for over {PATIENCE_S:g} s ({state.phase.value})"))
        state = replace(state, nag_at=None)
    if any(now >= suspicion.due for suspicion in state.suspects.values()):
        state, more = _judge(state, now)
        actions += more
    if state.return_at is not None and now >= state.return_at:
        state, more = replace(state, return_at=None, awaited=True), []
        state, more = open_attempt(state, now) if state.phase is Phase.PAUSED else (state, more)
        actions += more
    if state.retry is not None and now >= state.retry.due:
        state, more = attempt_failed(state, state.retry.why, now)
        actions += more
    if state.start_at is not None and now >= state.start_at:
        state, more = replenished(replace(state, start_at=None))
        actions += more
    if state.spares_from is not None and now >= state.spares_from:
        state, more = replenished(replace(state, spares_from=None), recovering=state.phase in (*ATTEMPTING, Phase.COMMITTING))
        actions += more
    if state.joins_from is not None and now >= state.joins_from:
        state = replace(state, joins_from=None, failed_joins=FAILED_JOINS - 1)
        state, more = replenished(state, recovering=state.phase in (*ATTEMPTING, Phase.COMMITTING))
        actions += more
    if state.join_at is not None and now >= state.join_at:
        state, more = _ask_boundary(state, now)
        actions += more
    return state, actions


_HANDLERS: dict[type, Callable[[ControlState, Any, float], Transition]] = {
    WorkerDied: _died,
    LostLink: _lost,
    Inventoried: inventoried,
    JoinerReady: _joiner_ready,
    PausedAt: _paused_at,
    Proposed: proposed,
    Unproposable: unproposable,
    Voted: voted,
    Committed: committed,
    CommitFailed: commit_failed,
    FirstCommit: _first_commit,
    WorkerFinished: _has_finished,
    Unbalanced: _unbalanced,
    Unresponsive: _unresponsive,
    Room: _room,
    Unable: _unable,
    Reopened: _reopened,
    Draining: _draining,
    Stopping: _stop,
    Timeout: _timeout,
}
