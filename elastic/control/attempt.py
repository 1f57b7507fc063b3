"""Transitions of the state machine for an attempt at the next view, from its opening to its commit. Pure."""

from __future__ import annotations

from dataclasses import replace

from elastic.control import spares
from elastic.control.events import (
    Announce,
    Commit,
    CommitFailed,
    Committed,
    ControlAction,
    Evict,
    Inventoried,
    Offer,
    Propose,
    Proposed,
    Quiesce,
    Tell,
    Unproposable,
    Vote,
    Voted,
)
from elastic.control.state import ATTEMPTING, ControlState, Misfit, Phase
from elastic.control.transitions import (
    FAILED_JOINS,
    Transition,
    close_job,
    end_job,
    evict,
    followed_by,
    gathering,
    replenished,
    respawns,
    suspected,
    without_attempt,
)
from elastic.errors import PlanError
from elastic.view import outlives

SETTLING_S = 0.3  # how long new workers are delayed for the first step of a new view
PATIENCE_S = 10.0  # after which the user is informed which workers have not answered
FAILED_ATTEMPTS = 3  # failures without a death that end the job
RETURN_S = 30.0  # how long hosts are awaited that fell silent, if the others lack a part of the state
_LEFT_TO_CHECKPOINTS = ("CoverageLost", "CopiesConflict", "StateUnproven")


def open_attempt(state: ControlState, now: float, *, joining: bool = False) -> Transition:
    """Opens the next attempt with all live members; if they are too few, pauses or ends the job.

    Spares join in any attempt in which members are missing, other ready workers only at a boundary, where no member is in the middle of
    an evaluation, or if the job would be too small without them.
    """
    joining = joining or state.reaching or state.misfit is not None or len(state.live) < state.least
    state = replace(
        without_attempt(state),
        join_at=None,
        start_at=None,
        nag_at=None,
    )
    if state.live and state.afresh:
        return replace(state, phase=Phase.PAUSED), []  # until the last live member is ended
    if not state.live and outlives(state.view.members) and not state.fallen:
        return _take_over(state, now)
    if not state.live and not state.policy.checkpoints and not state.afresh:
        return end_job(state, "CoverageLost", _all_lost(state))
    if not state.live:
        how = "begin with the newest checkpoint, or at step 0 where there is none"
        return _with_new_workers(replace(state, fallen=True), _all_lost(state), how, now)
    if state.reaching and state.starting:
        return replace(state, phase=Phase.PAUSED), []
    workers = (*state.live, *spares.joiners(state, at_boundary=joining))
    present = len(workers) if state.misfit is None else len(set(workers) - state.leaving.keys())
    if present < state.least:
        return _pause(state, present)
    return _quiesce(state, workers, now)


def _quiesce(state: ControlState, workers: tuple[int, ...], now: float) -> Transition:
    state = replace(state, phase=Phase.QUIESCING, attempt=state.attempt + 1, participants=frozenset(workers), nag_at=now + PATIENCE_S)
    damaged = tuple(worker for worker in workers if worker in state.damaged)
    return state, [Quiesce(attempt_id=state.attempt_id, workers=workers, restore=state.fallen, damaged=damaged)]


def _take_over(state: ControlState, now: float) -> Transition:
    """Handles the loss of all members whose state outlives them: new workers take it over."""
    if state.failed_joins >= FAILED_JOINS and not state.ready and state.last_tries < FAILED_JOINS:
        state = replace(state, failed_joins=0, joins_from=None, last_tries=state.last_tries + 1)  # nothing else can save the job
    return _with_new_workers(state, "all workers died", "take over their memory", now)


def _with_new_workers(state: ControlState, lost: str, how: str, now: float) -> Transition:
    """Goes on after the loss of all members with as many new workers as can be started, together; `how` says what they do."""
    state, started = replenished(state, awaited=True)
    if state.starting:
        said = [] if state.phase is Phase.PAUSED else [Tell(sentence=f"{lost}: new workers {how}")]
        return replace(state, phase=Phase.PAUSED), [*said, *started]
    workers = spares.joiners(state, at_boundary=True)
    if len(workers) < max(1, state.least):
        last = f"; the last loss: {state.cause}" if state.cause and state.cause not in lost else ""
        return end_job(state, "JobFailed", f"{lost}; new workers would {how}, but none can be started ({_hindrance(state)}){last}")
    return _quiesce(state, workers, now)


def _begin_afresh(state: ControlState, why: str, now: float) -> Transition:
    """Begins again at step 0 with new workers, and ends the live ones: they no longer have the whole initial state."""
    lost = f"{why}. " + f"The last loss: {state.cause}. " * bool(state.cause)
    again = "The training begins again at step 0, from the seed, and repeats the same steps bit for bit"
    told: list[ControlAction] = [Tell(sentence=lost + again)]
    state = replace(state, afresh=True)
    if not state.live:
        return followed_by(told, open_attempt(state, now))
    state, ended = replace(state, phase=Phase.PAUSED, participants=frozenset(), inventories={}), []
    for worker in state.live:
        state, more = evict(state, worker, "the training begins again at step 0, with new workers")
        ended += more
    return state, [*told, *ended]


def _all_lost(state: ControlState) -> str:
    alone = len(state.view.workers) == 1
    return f"{state.cause}; " * bool(state.cause) + (
        "it was the only worker: no copy of the state is left" if alone else "all workers died at once: no copy of the state is left"
    )


def _pause(state: ControlState, present: int) -> Transition:
    why, kind = f"the job may not shrink below min_workers={state.policy.min_workers}", "JobFailed"
    if state.misfit is not None and present >= state.policy.min_workers:
        why, kind = state.misfit.why, PlanError.__name__
    few = f"{present} worker{'s' * (present != 1)} left, and {why}"
    if not state.starting and not state.policy.hosts:
        return end_job(state, kind, f"{few}; none can be started ({_hindrance(state)}); the last loss: {state.cause}")
    said = [Tell(sentence=f"paused until new workers are ready: {few}")] if state.phase is not Phase.PAUSED else []
    return replace(state, phase=Phase.PAUSED), list(said)


def _hindrance(state: ControlState) -> str:
    return "respawn is off" if not state.policy.respawn else "the job is stopping" if state.stopping else "new workers die"


def inventoried(state: ControlState, event: Inventoried, now: float) -> Transition:
    if state.phase is not Phase.QUIESCING or event.attempt_id != state.attempt_id or event.worker not in state.participants:
        return state, []
    state = replace(state, inventories={**state.inventories, event.worker: event.inventory})
    if state.waits:
        return state, []
    joiners = {worker: state.ready[worker] for worker in sorted(state.participants.difference(state.view.workers))}
    state = replace(state, phase=Phase.PROPOSING, nag_at=None)
    few = respawns(state) and len(state.participants) < state.policy.workers
    return state, [
        Propose(
            attempt_id=state.attempt_id,
            view=state.view,
            inventories=dict(state.inventories),
            joiners=joiners,
            brief=few,
            slowdowns=state.slowdowns,
            restore=state.fallen,
            back=state.back,
            afresh=state.afresh,
            leaving=() if state.fallen else tuple(sorted(state.leaving.keys() & state.participants)),
        )
    ]


def proposed(state: ControlState, event: Proposed, now: float) -> Transition:
    if state.phase is not Phase.PROPOSING or event.attempt_id != state.attempt_id:
        return state, []
    state = replace(state, phase=Phase.MIGRATING, proposal=event.proposal, nag_at=now + PATIENCE_S)
    return state, [Offer(attempt_id=state.attempt_id, proposal=event.proposal)]


def unproposable(state: ControlState, event: Unproposable, now: float) -> Transition:
    if state.phase is not Phase.PROPOSING or event.attempt_id != state.attempt_id:
        return state, []
    if event.elsewhere and not state.fallen:
        state, started = replenished(replace(state, reaching=True))
        if state.starting or state.ready.keys() - state.participants:
            why = "part of the state is in the memory of hosts on which all workers died: new workers fetch it"
            return followed_by([Tell(sentence=why), *started], open_attempt(state, now))
    if event.kind == "CoverageLost" and event.returning and not state.fallen and not state.awaited:
        return _await_return(state, event.message, now)
    if state.policy.checkpoints and not state.fallen and event.kind in _LEFT_TO_CHECKPOINTS:
        told: list[ControlAction] = [Tell(sentence=f"{event.message}: going back to the newest checkpoint")]
        return followed_by(told, open_attempt(replace(state, fallen=True, back=event.back), now))
    if state.fallen and event.kind == "NothingSaved" and respawns(state) and not state.afresh:
        return _begin_afresh(state, event.message, now)
    if event.unbegun and not state.policy.checkpoints and respawns(state) and not state.afresh:
        return _begin_afresh(replace(state, fallen=True), event.message, now)
    if event.kind == PlanError.__name__:
        return _without_joiners(state, event.message, now) if _complete(state) else _await_room(state, event.message, now)
    cause = f"\nThe last loss: {state.cause}" if state.cause else ""
    lost, left = [worker for worker in state.view.workers if worker in state.dead], sorted(state.participants)
    who = f"without workers {lost}, which are lost, workers {left}" if lost else f"workers {left}"
    return end_job(state, event.kind, f"{who} cannot go on: {event.message}{_advice(state, event.kind)}{cause}")


def _complete(state: ControlState) -> bool:
    """Whether all members of the view take part and stay, and new workers with them."""
    staying = state.participants.difference(state.leaving)
    return staying.issuperset(state.view.workers) and len(staying) > len(state.view.workers)


def _without_joiners(state: ControlState, why: str, now: float) -> Transition:
    """Goes on with the members as they are, and as few as that: with new ones the model does not fit."""
    joiners, workers = sorted(state.participants.difference(state.view.workers)), len(state.view.workers)
    told: list[ControlAction] = [Tell(sentence=f"workers {joiners} cannot join, and the job stays at {workers}: {why}")]
    state = replace(state, policy=replace(state.policy, workers=workers))
    for worker in joiners:
        state, ended = evict(state, worker, "the model does not fit with it")
        told += ended
    return followed_by(told, open_attempt(state, now))


def _await_room(state: ControlState, why: str, now: float) -> Transition:
    """Starts the workers that are missing, and pauses until there are more members: the model does not fit on those of this attempt."""
    staying = state.participants.difference(state.leaving)
    state, started = replenished(replace(state, misfit=Misfit(workers=len(staying), why=why)))
    return followed_by(started, open_attempt(state, now))


def _advice(state: ControlState, kind: str) -> str:
    if kind != "CoverageLost" or state.policy.checkpoints:
        return ""
    return ". The job saved no checkpoint, so it begins at step 0 if it is started again: with Trainer(checkpoint=...) it would continue"


def _await_return(state: ControlState, lacks: str, now: float) -> Transition:
    """Pauses: a host that is back has the memory of its workers still."""
    why = f"{lacks}. Hosts that are silent may have it: the job waits {RETURN_S:g} s for them to come back"
    told = [Tell(sentence=why)] if state.return_at is None else []
    return replace(without_attempt(state), phase=Phase.PAUSED, return_at=state.return_at or now + RETURN_S), [*told]


def voted(state: ControlState, event: Voted, now: float) -> Transition:
    vote, proposal = event.vote, state.proposal
    if state.phase is not Phase.MIGRATING or proposal is None or event.attempt_id != state.attempt_id:
        return state, []
    if vote.worker not in proposal.view.workers or vote.worker in state.votes:
        return state, []
    state = replace(state, votes={**state.votes, vote.worker: vote})
    if not vote.passed:
        return _refused(state, vote, now)
    if state.waits or not all(vote.passed for vote in state.votes.values()):
        return state, []
    state = replace(state, phase=Phase.COMMITTING, suspects={}, nag_at=None)
    return state, [Commit(attempt_id=state.attempt_id, proposal=proposal, votes=dict(state.votes))]


def _refused(state: ControlState, vote: Vote, now: float) -> Transition:
    peer = vote.failed_peer
    if peer is not None and peer != vote.worker and peer in state.participants:
        return suspected(state, vote.worker, peer, now), []
    reason = vote.refusal or f"cannot reach worker {peer}"
    if vote.unreadable:  # the checkpoint is at fault, not the worker; ends when no checkpoint is left
        return followed_by([Tell(sentence=unreadable(vote.worker, reason))], open_attempt(state, now))
    if vote.worker in state.ready:
        return evict(state, vote.worker, reason)
    return attempt_failed(state, f"worker {vote.worker} rejected the proposal: {reason}", now)


def unreadable(worker: int, reason: str) -> str:
    return f"worker {worker} cannot read the newest checkpoint; all workers try an older one: {reason}"


def commit_failed(state: ControlState, event: CommitFailed, now: float) -> Transition:
    if state.phase not in (*ATTEMPTING, Phase.COMMITTING) or event.attempt_id != state.attempt_id:
        return state, []
    return attempt_failed(state, event.reason, now)


def attempt_failed(state: ControlState, reason: str, now: float) -> Transition:
    """Opens another attempt by the same workers, or ends the job after FAILED_ATTEMPTS failures."""
    if state.finished:
        return close_job(state, now)
    state = replace(state, failed_attempts=state.failed_attempts + 1)
    epoch, _ = state.attempt_id
    if state.failed_attempts >= FAILED_ATTEMPTS:
        return end_job(state, "JobFailed", f"epoch {epoch} was not reached in {state.failed_attempts} attempts; the last failure: {reason}")
    again = f"{reason}; the workers try again (failure {state.failed_attempts} of {FAILED_ATTEMPTS} at epoch {epoch})"
    return followed_by([Tell(sentence=again)], open_attempt(state, now))


def committed(state: ControlState, event: Committed, now: float) -> Transition:
    view = event.view
    if (view.epoch, view.attempt) <= (state.view.epoch, state.view.attempt):
        return state, []
    joined, known_spares = frozenset(view.workers).difference(state.view.workers), state.spares
    gone = {worker: why for worker, why in state.leaving.items() if worker not in view.workers and worker not in state.dead}
    state = replace(
        without_attempt(state),
        phase=Phase.RUNNING,
        view=view,
        attempt=0,
        starting=state.starting - joined,
        ready={worker: member for worker, member in state.ready.items() if worker not in joined},
        newcomers=joined,
        spares=state.spares - joined,
        fallen=False,
        back=None,
        afresh=False,
        reaching=False,
        misfit=None,
        return_at=None,
        awaited=False,
        damaged=frozenset(),
        failed_attempts=0,
        next_worker=max(state.next_worker, *(worker + 1 for worker in view.workers)),
        leaving={worker: why for worker, why in state.leaving.items() if worker in view.workers},
        nag_at=None,
    )
    announced: list[ControlAction] = [Announce(view=view, spares=tuple(sorted(known_spares & joined)))]
    announced += [Evict(worker=worker, why=why) for worker, why in gone.items()]
    if state.finished:  # a member that had finished before the attempt reached it
        return followed_by(announced, close_job(state, now))
    if len(state.live) < len(view.workers):
        return followed_by(announced, open_attempt(state, now))
    return gathering(replace(state, start_at=now + SETTLING_S), now), announced
