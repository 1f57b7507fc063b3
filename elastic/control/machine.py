"""The one state machine that changes who trains. It decides purely: what happened and the time go in, what to do comes out.

    RUNNING -> BOUNDARY -> QUIESCING -> PROPOSING -> MIGRATING -> COMMITTING -> RUNNING
       |   planned change      ^             |            |           |
       +------- death ---------+<------------+---death, refusal-------+     the next attempt, from the last committed view
                               |
                            PAUSED   fewer workers than the job may shrink to: waits for joiners

An attempt is known by its era (epoch, attempt); what carries another era is stale and ignored. Once a commit is under way the attempt
cannot be left: it may have happened. A death is remembered then, and handled from whichever view it turns out to be. Worker ids are never
used again, so the set of the dead only grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from elastic.control.blame import blamed
from elastic.control.events import (
    Action,
    Announce,
    AskBoundary,
    Commit,
    CommitFailed,
    Committed,
    EndJob,
    Event,
    Evict,
    Finished,
    FirstCommit,
    Inventoried,
    JoinerReady,
    LostLink,
    Offer,
    PausedAt,
    Propose,
    Proposed,
    Quiesce,
    Respawn,
    Stopping,
    Tell,
    Timeout,
    Unbalanced,
    Unproposable,
    Vote,
    Voted,
    WorkerDied,
)
from elastic.control.state import ATTEMPTING, Phase, Policy, Retry, State, Suspicion

if TYPE_CHECKING:
    from elastic.view import View

SUSPICION_S = 1.0  # how long a lost peer may take to be seen dead before it is evicted
GATHERING_S = 0.05  # how long a joiner waits for those that were started with it
CLOSING_S = 1.0  # how long the others may take to finish when one died at the end of the training
SETTLING_S = 0.3  # how long a new view has for its first step before new workers are started
PATIENCE_S = 10.0  # after which it is said who is waited for
LOSSES_KEPT = 100
FAILED_JOINS = 3
FAILED_ATTEMPTS = 3  # that nobody's death explains
_LEFT_TO_CHECKPOINTS = ("CoverageLost", "CopiesConflict")

Step = tuple[State, list[Action]]


def running(view: View, policy: Policy) -> State:
    """The state when the first view is committed."""
    return State(policy=policy, view=view, next_worker=max(view.workers) + 1)


def step(state: State, event: Event, now: float) -> Step:
    """What becomes of `state` by `event` at the time `now` (monotonic seconds), and what is to be done."""
    if state.phase is Phase.ENDED:
        return state, []
    return _HANDLERS[type(event)](state, event, now)


def _end(state: State, kind: str, message: str) -> Step:
    over = replace(state, phase=Phase.ENDED, start_at=None, join_at=None, close_at=None, nag_at=None, suspects={}, retry=None)
    return over, [EndJob(kind=kind, message=message)]


def _then(first: list[Action], rest: Step) -> Step:
    return rest[0], [*first, *rest[1]]


# Deaths


def _died(state: State, event: WorkerDied, now: float) -> Step:
    worker = event.worker
    if worker in state.dead:
        return state, []
    known = state.starting | state.ready.keys()
    state = replace(
        state,
        dead=state.dead | {worker},
        evicted=state.evicted - {worker},
        starting=state.starting - {worker},
        ready={other: member for other, member in state.ready.items() if other != worker},
        suspects=_without(state.suspects, worker),
    )
    if worker in state.view.workers:
        return _member_died(state, event, now)
    if worker in known:
        return _joiner_died(state, event, now)
    return state, []


def _member_died(state: State, event: WorkerDied, now: float) -> Step:
    worker = event.worker
    if worker in state.finished:
        return state, []
    state = replace(state, cause=event.how, failed_joins=state.failed_joins + (worker in state.newcomers))
    if state.finished:
        return _close(state, now)
    if event.loss is not None:
        state = replace(state, losses=(*state.losses[-LOSSES_KEPT:], event.loss))
        if (why := blamed(state.losses)) is not None:
            return _end(state, "JobFailed", f"{why}; the last of them: {event.how}")
    state, actions = _replenished(state, recovering=True)
    told: list[Action] = [Tell(sentence=event.how), *actions]
    # What is being committed may be the view already.
    return (state, told) if state.phase is Phase.COMMITTING else _then(told, _open(state, now))


def _joiner_died(state: State, event: WorkerDied, now: float) -> Step:
    state = replace(state, failed_joins=state.failed_joins + 1)
    state, actions = _replenished(state, recovering=state.phase in (*ATTEMPTING, Phase.COMMITTING))
    told: list[Action] = [Tell(sentence=f"{event.how}, before it had joined"), *actions]
    if state.policy.respawn and state.failed_joins == FAILED_JOINS:
        told.append(Tell(sentence=f"{FAILED_JOINS} new workers have died before a step was committed with them: no more are started"))
    if state.phase is Phase.PAUSED or (state.phase in ATTEMPTING and event.worker in state.participants):
        return _then(told, _open(state, now))
    return state, told


def _replenished(state: State, *, recovering: bool = False) -> Step:
    """Starts as many workers as are missing, where that is wanted and has not failed too often.

    A new worker takes processor time from those who recover: it is started when their first step is committed, or soon if steps are long,
    unless it is what they wait for.
    """
    if recovering and len(state.live) >= state.policy.min_workers:
        return state, []
    missing = state.policy.workers - len(state.live) - len(state.ready) - len(state.starting)
    if not _respawns(state) or missing <= 0 or not (state.live or state.fallen):
        return state, []
    numbers = tuple(range(state.next_worker, state.next_worker + missing))
    started = replace(state, starting=state.starting | set(numbers), next_worker=state.next_worker + missing)
    return started, [Respawn(workers=numbers)]


def _respawns(state: State) -> bool:
    return state.policy.respawn and not state.stopping and not state.finished and state.failed_joins < FAILED_JOINS


# Attempts


def _open(state: State, now: float, *, joining: bool = False) -> Step:
    """The next attempt, of all who live; or a pause, or the end, where they are too few.

    Whoever is ready joins at a boundary only, where nobody is in the middle of an evaluation, or where the job were too small otherwise.
    """
    joining = joining or len(state.live) < state.policy.min_workers
    state = replace(
        state,
        participants=frozenset(),
        paused={},
        inventories={},
        proposal=None,
        votes={},
        suspects={},
        retry=None,
        join_at=None,
        start_at=None,
        nag_at=None,
    )
    if state.live and state.afresh:
        return replace(state, phase=Phase.PAUSED), []  # until the last of them is ended
    if not state.live:
        return _begin_again(state, now) if state.policy.checkpoints else _end(state, "JobFailed", _all_lost(state))
    workers = (*state.live, *(sorted(state.ready) if joining else ()))
    if len(workers) < state.policy.min_workers:
        return _pause(state, len(workers))
    return _quiesce(state, workers, now)


def _quiesce(state: State, workers: tuple[int, ...], now: float) -> Step:
    state = replace(state, phase=Phase.QUIESCING, attempt=state.attempt + 1, participants=frozenset(workers), nag_at=now + PATIENCE_S)
    damaged = tuple(worker for worker in workers if worker in state.damaged)
    return state, [Quiesce(era=state.era, workers=workers, restore=state.fallen, damaged=damaged)]


def _begin_again(state: State, now: float) -> Step:
    """Nobody is left: new workers begin with the newest checkpoint, all that can be started at once."""
    state, started = _replenished(replace(state, fallen=True))
    if state.starting:
        said = [] if state.phase is Phase.PAUSED else [Tell(sentence=f"{_all_lost(state)}: new workers begin with the newest checkpoint")]
        return replace(state, phase=Phase.PAUSED), [*said, *started]
    if len(state.ready) < max(1, state.policy.min_workers):
        why = f"new workers would begin with the newest checkpoint, but none can be started ({_hindrance(state)})"
        return _end(state, "JobFailed", f"{_all_lost(state)}; {why}")
    return _quiesce(state, tuple(sorted(state.ready)), now)


def _begin_afresh(state: State, why: str, now: float) -> Step:
    """New workers begin again at step 0. Those that live have trained: they have not the initial state any more, and are ended."""
    lost = f"{why}. " + f"The last loss: {state.cause}. " * bool(state.cause)
    again = "The training begins again at step 0, from the seed: it comes to the same steps, bit for bit"
    told: list[Action] = [Tell(sentence=lost + again)]
    state = replace(state, afresh=True)
    if not state.live:
        return _then(told, _open(state, now))
    state, ended = replace(state, phase=Phase.PAUSED, participants=frozenset(), inventories={}), []
    for worker in state.live:
        state, more = _evict(state, worker, "the training begins again at step 0, with new workers")
        ended += more
    return state, [*told, *ended]


def _all_lost(state: State) -> str:
    alone = len(state.view.workers) == 1
    return f"{state.cause}; " * bool(state.cause) + (
        "it was the only worker: no copy of the state is left" if alone else "all workers died at once: no copy of the state is left"
    )


def _pause(state: State, present: int) -> Step:
    few = f"{present} worker{'s' * (present != 1)} left, and the job may not shrink below min_workers={state.policy.min_workers}"
    if not state.starting:
        return _end(state, "JobFailed", f"{few}; none can be started ({_hindrance(state)}); the last loss: {state.cause}")
    said = [Tell(sentence=f"{few}: paused until new workers are ready")] if state.phase is not Phase.PAUSED else []
    return replace(state, phase=Phase.PAUSED), list(said)


def _hindrance(state: State) -> str:
    return "respawn is off" if not state.policy.respawn else "the job is stopping" if state.stopping else "new workers die"


def _inventoried(state: State, event: Inventoried, now: float) -> Step:
    if state.phase is not Phase.QUIESCING or event.era != state.era or event.worker not in state.participants:
        return state, []
    state = replace(state, inventories={**state.inventories, event.worker: event.inventory})
    if state.missing:
        return state, []
    joiners = {worker: state.ready[worker] for worker in sorted(state.participants.difference(state.view.workers))}
    state = replace(state, phase=Phase.PROPOSING, nag_at=None)
    few = _respawns(state) and len(state.participants) < state.policy.workers
    return state, [
        Propose(
            era=state.era,
            view=state.view,
            inventories=dict(state.inventories),
            joiners=joiners,
            brief=few,
            slowdowns=state.slowdowns,
            restore=state.fallen,
            afresh=state.afresh,
        )
    ]


def _proposed(state: State, event: Proposed, now: float) -> Step:
    if state.phase is not Phase.PROPOSING or event.era != state.era:
        return state, []
    state = replace(state, phase=Phase.MIGRATING, proposal=event.proposal, nag_at=now + PATIENCE_S)
    return state, [Offer(era=state.era, proposal=event.proposal)]


def _unproposable(state: State, event: Unproposable, now: float) -> Step:
    if state.phase is not Phase.PROPOSING or event.era != state.era:
        return state, []
    if state.policy.checkpoints and not state.fallen and event.kind in _LEFT_TO_CHECKPOINTS:
        told: list[Action] = [Tell(sentence=f"{event.message}: going back to the newest checkpoint")]
        return _then(told, _open(replace(state, fallen=True), now))
    if state.fallen and event.kind == "NothingSaved" and _respawns(state) and not state.afresh:
        return _begin_afresh(state, event.message, now)
    cause = f"\nThe last loss: {state.cause}" if state.cause else ""
    lost, left = [worker for worker in state.view.workers if worker in state.dead], sorted(state.participants)
    who = f"without workers {lost}, which are lost, workers {left}" if lost else f"workers {left}"
    return _end(state, event.kind, f"{who} cannot go on: {event.message}{cause}")


def _voted(state: State, event: Voted, now: float) -> Step:
    vote, proposal = event.vote, state.proposal
    if state.phase is not Phase.MIGRATING or proposal is None or event.era != state.era or vote.worker not in state.missing:
        return state, []
    state = replace(state, votes={**state.votes, vote.worker: vote})
    if not vote.passed:
        return _refused(state, vote, now)
    if state.missing or not all(vote.passed for vote in state.votes.values()):
        return state, []
    state = replace(state, phase=Phase.COMMITTING, suspects={}, nag_at=None)
    return state, [Commit(era=state.era, proposal=proposal, votes=dict(state.votes))]


def _refused(state: State, vote: Vote, now: float) -> Step:
    peer = vote.failed_peer
    if peer is not None and peer != vote.worker and peer in state.participants:
        return _suspected(state, vote.worker, peer, now), []
    reason = vote.refusal or f"cannot reach worker {peer}"
    if vote.unreadable:  # that checkpoint's fault, not the worker's; there are not endlessly many
        return _then([Tell(sentence=_unreadable(vote.worker, reason))], _open(state, now))
    if vote.worker in state.ready:
        return _evict(state, vote.worker, reason)
    return _failed(state, f"worker {vote.worker} refuses: {reason}", now)


def _unreadable(worker: int, reason: str) -> str:
    return f"worker {worker} cannot begin with the newest checkpoint, and an older one is tried: {reason}"


def _commit_failed(state: State, event: CommitFailed, now: float) -> Step:
    if state.phase not in (*ATTEMPTING, Phase.COMMITTING) or event.era != state.era:
        return state, []
    return _failed(state, event.reason, now)


def _failed(state: State, reason: str, now: float) -> Step:
    """Another attempt by the same workers; not for ever."""
    if state.finished:
        return _close(state, now)
    state = replace(state, failed_attempts=state.failed_attempts + 1)
    epoch, attempt = state.era
    if state.failed_attempts >= FAILED_ATTEMPTS:
        return _end(state, "JobFailed", f"epoch {epoch} could not be reached in {state.failed_attempts} attempts; the last: {reason}")
    return _then([Tell(sentence=f"attempt {attempt} at epoch {epoch} failed: {reason}")], _open(state, now))


def _committed(state: State, event: Committed, now: float) -> Step:
    view = event.view
    if (view.epoch, view.attempt) <= (state.view.epoch, state.view.attempt):
        return state, []
    joined = frozenset(view.workers).difference(state.view.workers)
    state = replace(
        state,
        phase=Phase.RUNNING,
        view=view,
        attempt=0,
        starting=state.starting - joined,
        ready={worker: member for worker, member in state.ready.items() if worker not in joined},
        participants=frozenset(),
        paused={},
        inventories={},
        proposal=None,
        votes={},
        suspects={},
        retry=None,
        newcomers=joined,
        fallen=False,
        afresh=False,
        damaged=frozenset(),
        failed_attempts=0,
        next_worker=max(state.next_worker, *(worker + 1 for worker in view.workers)),
        nag_at=None,
    )
    announced: list[Action] = [Announce(view=view)]
    if state.finished:  # a member that had returned before it could hear of the attempt
        return _then(announced, _close(state, now))
    if len(state.live) < len(view.workers):
        return _then(announced, _open(state, now))
    return _gathering(replace(state, start_at=now + SETTLING_S), now), announced


# Lost links


def _lost(state: State, event: LostLink, now: float) -> Step:
    """While an attempt is under way, links are dropped on purpose; the votes tell of those that are needed."""
    if event.damaged:
        return _damaged(state, event, now)
    if state.phase not in (Phase.RUNNING, Phase.BOUNDARY) or event.epoch != state.view.epoch or event.reporter not in state.live:
        return state, []
    if event.unreadable:
        return _then([Tell(sentence=_unreadable(event.reporter, event.reason))], _open(state, now))
    if event.peer is None:
        why = f"worker {event.reporter} cannot go on: {event.reason}"
        return replace(state, retry=state.retry or Retry(due=now + SUSPICION_S, why=why)), []
    if event.peer not in state.live or event.reporter == event.peer:
        return state, []
    if event.peer in state.finished:
        cause = state.cause or f"worker {event.reporter} lost worker {event.peer}, which had finished"
        return _close(replace(state, cause=cause), now)
    return _suspected(state, event.reporter, event.peer, now), []


def _damaged(state: State, event: LostLink, now: float) -> Step:
    """All go on without the copies that the reporter has given up. What it says in an attempt comes before its inventory."""
    if event.epoch != state.view.epoch or event.reporter not in state.live:
        return state, []
    if state.finished:
        return _close(replace(state, cause=event.reason), now)
    state = replace(state, damaged=state.damaged | {event.reporter}, cause=event.reason)
    told: list[Action] = [Tell(sentence=event.reason)]
    return _then(told, _open(state, now)) if state.phase in (Phase.RUNNING, Phase.BOUNDARY, *ATTEMPTING) else (state, told)


def _suspected(state: State, reporter: int, peer: int, now: float) -> State:
    if peer in state.evicted:
        return state
    known = state.suspects.get(peer, Suspicion(due=now + SUSPICION_S, reporters=frozenset()))
    return replace(state, suspects={**state.suspects, peer: replace(known, reporters=known.reporters | {reporter})})


def _without(suspects: Mapping[int, Suspicion], worker: int) -> dict[int, Suspicion]:
    """What is left of the suspicions when `worker` is out: two that lost each other are not both to blame."""
    rest = {peer: replace(known, reporters=known.reporters - {worker}) for peer, known in suspects.items() if peer != worker}
    return {peer: known for peer, known in rest.items() if known.reporters}


def _judge(state: State, now: float) -> Step:
    """Evicts the one whom most have lost; of equals the one that came last."""
    worker = max(state.suspects, key=lambda peer: (len(state.suspects[peer].reporters), peer))
    reporters = ", ".join(map(str, sorted(state.suspects[worker].reporters)))
    return _evict(state, worker, f"lost by {reporters}, though its process still runs after {SUSPICION_S:g} s")


def _evict(state: State, worker: int, why: str) -> Step:
    """Its death, which follows, does the rest."""
    if worker in state.evicted:
        return state, []
    state = replace(state, evicted=state.evicted | {worker}, suspects=_without(state.suspects, worker))
    return state, [Evict(worker=worker, why=why)]


# Planned changes, and the end


def _joiner_ready(state: State, event: JoinerReady, now: float) -> Step:
    if event.worker not in state.starting or event.worker in state.evicted:
        return state, []
    state = replace(state, starting=state.starting - {event.worker}, ready={**state.ready, event.worker: event.member})
    if state.phase is Phase.PAUSED:
        return _open(state, now)
    return (_gathering(state, now) if state.phase is Phase.RUNNING else state), []


def _gathering(state: State, now: float) -> State:
    """Sets the time at which the ready joiners are let in."""
    if not state.ready or state.stopping or state.finished:
        return replace(state, join_at=None)
    if not state.starting:
        return replace(state, join_at=now)
    return replace(state, join_at=now + GATHERING_S if state.join_at is None else state.join_at)


def _ask_boundary(state: State, now: float) -> Step:
    state = replace(state, join_at=None)
    if not state.ready:
        return state, []
    return _boundary(state, now)


def _unbalanced(state: State, event: Unbalanced, now: float) -> Step:
    """The members change their plan, and those who are ready join at the same time."""
    return _boundary(replace(state, slowdowns=dict(event.slowdowns)), now)


def _boundary(state: State, now: float) -> Step:
    if state.phase is not Phase.RUNNING or state.stopping or state.finished:
        return state, []
    return replace(state, phase=Phase.BOUNDARY, paused={}, join_at=None, nag_at=now + PATIENCE_S), [AskBoundary(workers=state.live)]


def _paused_at(state: State, event: PausedAt, now: float) -> Step:
    """Should they stand at different steps, their inventories will tell; nothing is lost by going on."""
    if state.phase is not Phase.BOUNDARY or event.epoch != state.view.epoch or event.worker not in state.live:
        return state, []
    state = replace(state, paused={**state.paused, event.worker: event.step})
    return (state, []) if state.missing else _open(state, now, joining=True)


def _first_commit(state: State, event: FirstCommit, now: float) -> Step:
    if event.epoch != state.view.epoch or state.attempt:
        return state, []
    failed_joins = 0 if state.newcomers else state.failed_joins
    return _replenished(replace(state, newcomers=frozenset(), failed_joins=failed_joins, start_at=None))


def _has_finished(state: State, event: Finished, now: float) -> Step:
    if event.worker not in state.live:
        return state, []
    state = replace(state, finished=state.finished | {event.worker}, join_at=None)
    if state.phase is Phase.BOUNDARY:  # the training ended before it got there
        return replace(state, phase=Phase.RUNNING, paused={}, nag_at=None), []
    if state.phase in (*ATTEMPTING, Phase.PAUSED):
        return _close(state, now)
    return state, []


def _close(state: State, now: float) -> Step:
    """Gives the others a moment to finish as well, since with a finished member there is no next view."""
    if state.phase is Phase.CLOSING:
        return state, []
    cause = state.cause or "a worker finished while the members of the job were changing"
    return replace(
        state, phase=Phase.CLOSING, cause=cause, close_at=now + CLOSING_S, join_at=None, nag_at=None, suspects={}, retry=None
    ), []


def _stop(state: State, event: Stopping, now: float) -> Step:
    state = replace(state, stopping=True, join_at=None)
    return _open(state, now) if state.phase is Phase.PAUSED else (state, [])


def _timeout(state: State, event: Timeout, now: float) -> Step:
    if state.close_at is not None and now >= state.close_at:
        return _end(state, "JobFailed", state.cause)
    actions: list[Action] = []
    if state.nag_at is not None and now >= state.nag_at:
        actions.append(Tell(sentence=f"{state.phase.value}: waiting for workers {list(state.missing)}"))
        state = replace(state, nag_at=None)
    if any(now >= suspicion.due for suspicion in state.suspects.values()):
        state, more = _judge(state, now)
        actions += more
    if state.retry is not None and now >= state.retry.due:
        state, more = _failed(state, state.retry.why, now)
        actions += more
    if state.start_at is not None and now >= state.start_at:
        state, more = _replenished(replace(state, start_at=None))
        actions += more
    if state.join_at is not None and now >= state.join_at:
        state, more = _ask_boundary(state, now)
        actions += more
    return state, actions


_HANDLERS: dict[type, Callable[[State, Any, float], Step]] = {
    WorkerDied: _died,
    LostLink: _lost,
    Inventoried: _inventoried,
    JoinerReady: _joiner_ready,
    PausedAt: _paused_at,
    Proposed: _proposed,
    Unproposable: _unproposable,
    Voted: _voted,
    Committed: _committed,
    CommitFailed: _commit_failed,
    FirstCommit: _first_commit,
    Finished: _has_finished,
    Unbalanced: _unbalanced,
    Stopping: _stop,
    Timeout: _timeout,
}
