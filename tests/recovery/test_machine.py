"""The state machine branch by branch, with views that are nothing but members, and a clock that is a number."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from elastic.control import machine
from elastic.control.attempt import FAILED_ATTEMPTS, PATIENCE_S, SETTLING_S
from elastic.control.blame import Loss
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
    Unproposable,
    Vote,
    Voted,
    WorkerDied,
)
from elastic.control.state import Phase, Policy, State
from elastic.control.transitions import CLOSING_S, FAILED_JOINS, GATHERING_S, SUSPICION_S


@dataclass(frozen=True)
class FakeView:
    epoch: int
    attempt: int
    workers: tuple[int, ...]


@dataclass(frozen=True)
class FakeProposal:
    view: FakeView


@dataclass
class Machine:
    """The machine, told what happens in few words; keeps what it did since the last `done`."""

    state: State
    now: float = 100.0
    actions: list[Action] = field(default_factory=list)

    def feed(self, *events: Event) -> Machine:
        for event in events:
            self.state, actions = machine.step(self.state, event, self.now)
            self.actions += actions
        return self

    def wait(self, seconds: float) -> Machine:
        self.now += seconds
        return self.feed(Timeout())

    @property
    def done(self) -> list[Action]:
        actions, self.actions = self.actions, []
        return [action for action in actions if not isinstance(action, Tell)]

    @property
    def told(self) -> str:
        return "\n".join(action.sentence for action in self.actions if isinstance(action, Tell))

    @property
    def phase(self) -> Phase:
        return self.state.phase

    def die(self, worker: int, **more: Any) -> Machine:
        return self.feed(WorkerDied(worker=worker, how=f"worker {worker} fell", **more))

    def inventories(self) -> Machine:
        """Everybody in the attempt answers."""
        return self.feed(*(Inventoried(worker=worker, era=self.state.era, inventory=Any) for worker in self.state.missing))

    def proposed(self) -> Machine:
        view = FakeView(*self.state.era, tuple(sorted(self.state.participants)))
        return self.feed(Proposed(era=self.state.era, proposal=FakeProposal(view)))

    def vote(self, worker: int, **more: Any) -> Machine:
        return self.feed(Voted(era=self.state.era, vote=Vote(worker=worker, **more)))

    def votes(self) -> Machine:
        for worker in self.state.missing:
            self.vote(worker)
        return self

    def committed(self) -> Machine:
        assert self.state.proposal is not None
        return self.feed(Committed(view=self.state.proposal.view))

    def recover(self) -> Machine:
        """The rest of the attempt under way, and the time until new workers are started."""
        self.inventories().proposed().votes()
        return self.committed().wait(SETTLING_S)

    def ready(self, worker: int) -> Machine:
        return self.feed(JoinerReady(worker=worker, member=Any))

    def ended(self) -> str:
        last = self.actions[-1]
        assert isinstance(last, EndJob)
        assert self.phase is Phase.ENDED
        return last.message


def running(workers: int = 3, **policy: Any) -> Machine:
    """A job in epoch 1; nobody is replaced unless asked for."""
    options = {"workers": workers, "respawn": False, **policy}
    return Machine(machine.running(FakeView(1, 0, tuple(range(workers))), Policy(**options)))


@pytest.mark.parametrize("respawn", [True, False])
def test_a_view_is_brief_if_replacements_are_to_come(respawn: bool) -> None:
    *_, asked = running(respawn=respawn).die(1).inventories().done
    assert isinstance(asked, Propose)
    assert asked.brief is respawn


def test_a_death_is_recovered_from_in_one_attempt() -> None:
    job = running().die(1)
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 2))]
    job.inventories()
    assert job.done == [Propose(era=(2, 1), view=job.state.view, inventories={0: Any, 2: Any}, joiners={})]
    job.proposed()
    proposal = FakeProposal(FakeView(2, 1, (0, 2)))
    assert job.done == [Offer(era=(2, 1), proposal=proposal)]
    job.vote(0)
    assert job.done == []
    job.vote(2)
    assert job.done == [Commit(era=(2, 1), proposal=proposal, votes={0: Vote(worker=0), 2: Vote(worker=2)})]
    job.committed()
    assert job.done == [Announce(view=proposal.view)]
    assert (job.phase, job.state.era) == (Phase.RUNNING, (2, 1))
    job.die(2)
    assert job.done == [Quiesce(era=(3, 1), workers=(0,))]


def test_every_answer_of_another_era_is_ignored() -> None:
    job = running(4).die(1)
    stale = job.state.era
    job.inventories().die(2)
    assert job.state.era == (2, 2)
    view = FakeView(*stale, (0, 2, 3))
    before = job.state
    job.feed(
        Inventoried(worker=0, era=stale, inventory=Any),
        Proposed(era=stale, proposal=FakeProposal(view)),
        Unproposable(era=stale, kind="CoverageLost", message="all gone"),
        Voted(era=stale, vote=Vote(worker=0)),
        CommitFailed(era=stale, reason="late"),
        PausedAt(worker=0, epoch=1, step=3),
        Committed(view=FakeView(1, 0, (0, 1, 2, 3))),
        Timeout(),
    )
    assert job.state == before


@pytest.mark.parametrize("until", ["", "inventories", "inventories proposed"])
def test_a_death_in_an_attempt_burns_it_and_opens_the_next(until: str) -> None:
    job = running(4).die(1)
    for what in until.split():
        getattr(job, what)()
    _ = job.done
    job.die(3)
    assert job.done == [Quiesce(era=(2, 2), workers=(0, 2))]
    job.recover()
    assert job.state.view == FakeView(2, 2, (0, 2))


def test_a_death_while_committing_waits_for_the_result_and_goes_on_from_it() -> None:
    job = running(4).die(1).inventories().proposed().votes()
    _ = job.done
    job.die(3)
    assert job.done == []
    job.committed()
    assert job.done == [Announce(view=FakeView(2, 1, (0, 2, 3))), Quiesce(era=(3, 1), workers=(0, 2))]


def test_a_death_while_a_commit_fails() -> None:
    job = running(4).die(1).inventories().proposed().votes().die(3)
    _ = job.done
    job.feed(CommitFailed(era=(2, 1), reason="refused"))
    assert job.done == [Quiesce(era=(2, 2), workers=(0, 2))]


def test_a_view_that_others_committed_is_adopted() -> None:
    job = running()
    view = FakeView(5, 2, (0, 1, 9))
    job.feed(Committed(view=view), Committed(view=view))
    assert job.done == [Announce(view=view)]
    assert job.state.next_worker == 10


def test_without_a_way_on_the_job_ends_with_the_reason_and_what_began_it() -> None:
    job = running().die(1).inventories().feed(Unproposable(era=(2, 1), kind="CoverageLost", message="layer 3 is gone"))
    assert "layer 3 is gone" in job.ended()
    assert "worker 1 fell" in job.ended()
    assert job.actions[-1].kind == "CoverageLost"
    assert job.die(0).feed(Stopping()).phase is Phase.ENDED


def test_all_dead() -> None:
    assert "all workers died at once: no copy of the state is left" in running(2).die(0).die(1).ended()
    assert "it was the only worker: no copy of the state is left" in running(1).die(0).ended()


def test_commits_that_fail_are_tried_again_but_not_for_ever() -> None:
    job = running().die(1)
    for attempt in (1, 2):
        assert job.state.era == (2, attempt)
        job.inventories().feed(CommitFailed(era=job.state.era, reason="somebody else coordinates"))
    assert "attempt 2 at epoch 2 failed: somebody else coordinates" in job.told
    job.inventories().proposed().votes().feed(CommitFailed(era=(2, 3), reason="again"))
    assert "epoch 2 could not be reached in 3 attempts; the last: again" in job.ended()


# Votes


def test_a_refusal_opens_the_next_attempt_and_says_why() -> None:
    job = running().die(1).inventories().proposed().vote(0)
    _ = job.done
    job.vote(2, refusal="digest of layer 1 differs")
    assert "worker 2 refuses: digest of layer 1 differs" in job.told
    assert job.done == [Quiesce(era=(2, 2), workers=(0, 2))]


def test_a_vote_counts_once_and_only_of_a_member() -> None:
    job = running(4).die(1).inventories().proposed().vote(0).vote(0).vote(1).vote(9).vote(2)
    assert job.phase is Phase.MIGRATING
    assert job.state.missing == (3,)


def test_a_peer_that_failed_while_migrating_is_given_time_to_be_seen_dead() -> None:
    job = running(4).die(1).inventories().proposed().vote(0, refusal="link lost", failed_peer=3).vote(2)
    _ = job.done
    job.vote(3)
    assert job.phase is Phase.MIGRATING, "one vote did not pass"
    job.wait(SUSPICION_S / 2)
    assert job.done == []
    job.wait(SUSPICION_S / 2)
    assert [type(action) for action in job.done] == [Evict]
    job.wait(5)
    assert job.done == [], "it is evicted once"
    job.die(3)
    assert job.done == [Quiesce(era=(2, 2), workers=(0, 2))]


def test_a_joiner_that_refuses_is_evicted_and_the_others_go_on() -> None:
    job = at_boundary().inventories().proposed()
    assert job.state.participants == {0, 2, 3}
    _ = job.done
    job.vote(3, refusal="out of memory")
    assert job.done == [Evict(worker=3, why="out of memory")]
    job.die(3)
    assert job.done == [Quiesce(era=(3, 2), workers=(0, 2))]
    job.recover()
    assert job.done[-1] == Respawn(workers=(4,))


# Lost links


def test_a_lost_peer_that_dies_in_time_is_an_ordinary_death() -> None:
    job = running().feed(LostLink(reporter=0, peer=1, epoch=1))
    assert job.state.wake_at == job.now + SUSPICION_S
    job.die(1).wait(SUSPICION_S)
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 2))]


def damaged(worker: int, epoch: int = 1) -> LostLink:
    return LostLink(reporter=worker, peer=None, epoch=epoch, reason=f"worker {worker}: its memory has changed", damaged=True)


def test_a_member_with_damaged_copies_goes_on_with_the_others_at_once_and_all_hear_of_it() -> None:
    job = running().feed(damaged(1))
    assert job.told == "worker 1: its memory has changed"
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 1, 2), damaged=(1,))]
    job.feed(damaged(2))  # found while it made its inventory, which comes behind that
    assert job.done == [Quiesce(era=(2, 2), workers=(0, 1, 2), damaged=(1, 2))]
    job.recover().done  # noqa: B018
    job.die(0)
    assert job.done == [Quiesce(era=(3, 1), workers=(1, 2))], "what they hold in the next view is good"


def test_damage_of_another_view_or_of_the_dead_is_nobodys() -> None:
    assert running().feed(damaged(1, epoch=0)).done == []
    job = running().die(1)
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 2))]
    assert job.feed(damaged(1)).done == []


def test_damage_that_nobody_has_another_copy_of_is_named_at_the_end() -> None:
    job = running(1).feed(damaged(0)).inventories()
    job.feed(Unproposable(era=job.state.era, kind="CoverageLost", message="no copy of layer 3"))
    assert "cannot go on: no copy of layer 3" in job.ended()
    assert "its memory has changed" in job.ended()


def test_a_lost_peer_that_lives_on_is_evicted() -> None:
    job = running().feed(LostLink(reporter=0, peer=1, epoch=1)).wait(SUSPICION_S)
    assert job.done == [Evict(worker=1, why="lost by 0, though its process still runs after 1 s")]


def test_of_two_that_lost_each_other_only_one_is_evicted() -> None:
    job = running().feed(LostLink(reporter=0, peer=1, epoch=1), LostLink(reporter=1, peer=0, epoch=1)).wait(SUSPICION_S).wait(5)
    assert [action.worker for action in job.done] == [1]


def test_the_one_whom_most_have_lost_is_evicted() -> None:
    lost = [LostLink(reporter=0, peer=1, epoch=1), LostLink(reporter=0, peer=2, epoch=1), LostLink(reporter=1, peer=0, epoch=1)]
    job = running().feed(*lost, LostLink(reporter=2, peer=0, epoch=1)).wait(SUSPICION_S).wait(5)
    assert [action.worker for action in job.done] == [0]


@pytest.mark.parametrize("lost", [(0, 0, 1), (0, 1, 2), (0, 7, 1), (7, 0, 1)])
def test_a_loss_that_cannot_be_is_ignored(lost: tuple[int, int, int]) -> None:
    reporter, peer, epoch = lost
    assert running().feed(LostLink(reporter=reporter, peer=peer, epoch=epoch)).state.wake_at is None


def test_a_worker_that_stopped_for_no_known_reason_is_taken_along_again() -> None:
    job = running().feed(LostLink(reporter=0, peer=None, epoch=1, reason="a digest differs")).wait(SUSPICION_S)
    assert "worker 0 cannot go on: a digest differs" in job.told
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 1, 2))]
    assert job.state.retry is None
    job = running().feed(LostLink(reporter=0, peer=None, epoch=1)).die(1).wait(SUSPICION_S)
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 2))], "a death explains it"


def test_links_lost_while_an_attempt_is_under_way_are_expected() -> None:
    job = running().feed(LostLink(reporter=0, peer=2, epoch=1)).die(1).feed(LostLink(reporter=2, peer=0, epoch=1))
    assert job.state.suspects == {}


# Joiners


def at_boundary() -> Machine:
    """Worker 1 of three has died, and worker 3 is let in: everybody has paused for it."""
    job = running(respawn=True).die(1).recover().ready(3).feed(Timeout())
    return job.feed(PausedAt(worker=0, epoch=2, step=4), PausedAt(worker=2, epoch=2, step=4))


def test_a_replacement_is_started_behind_the_recovery_and_joins_at_a_boundary() -> None:
    job = running(respawn=True).die(1)
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 2))]
    job.inventories().proposed().votes()
    assert not any(isinstance(action, Respawn) for action in job.done), "it would take processor time from those who recover"
    job.committed()
    assert job.done == [Announce(view=FakeView(2, 1, (0, 2)))], "nor from the step that they have to take again"
    assert job.state.wake_at == job.now + SETTLING_S
    job.feed(FirstCommit(worker=0, epoch=2, step=6))
    assert job.done == [Respawn(workers=(3,))]
    assert job.wait(SETTLING_S).done == []
    job.ready(3).feed(Timeout())
    assert job.done == [AskBoundary(workers=(0, 2))]
    job.feed(PausedAt(worker=0, epoch=2, step=7), PausedAt(worker=0, epoch=2, step=7))
    assert job.done == []
    job.feed(PausedAt(worker=2, epoch=2, step=7))
    assert job.done == [Quiesce(era=(3, 1), workers=(0, 2, 3))]
    job.recover()
    assert job.state.view.workers == (0, 2, 3)
    assert job.state.newcomers == {3}
    assert job.state.ready == {}


def test_joiners_that_were_started_together_come_in_together_if_they_are_quick() -> None:
    job = running(4, respawn=True).die(1).die(2).recover()
    assert job.state.starting == {4, 5}
    _ = job.done
    job.ready(4).wait(GATHERING_S / 2)
    assert job.done == []
    job.ready(5).feed(Timeout())
    assert [type(action) for action in job.done] == [AskBoundary], "nobody else is to come"


def test_a_joiner_does_not_wait_long_for_another() -> None:
    job = running(4, respawn=True).die(1).die(2).recover()
    _ = job.done
    job.ready(5).wait(GATHERING_S)
    assert [type(action) for action in job.done] == [AskBoundary]


def test_a_joiner_that_is_ready_during_an_attempt_waits_for_the_next_boundary() -> None:
    job = running(4, respawn=True).die(1).recover().die(2).inventories()
    _ = job.done
    job.ready(4).proposed()
    assert [action.proposal.view.workers for action in job.done] == [(0, 3)]
    job.votes().committed()
    assert job.done[-1] == Announce(view=FakeView(3, 1, (0, 3)))
    job.wait(GATHERING_S)
    assert job.done == [AskBoundary(workers=(0, 3))]
    job.wait(SETTLING_S)
    assert job.done == [Respawn(workers=(5,))]


def test_a_death_while_a_boundary_is_awaited_is_a_recovery_without_the_joiners() -> None:
    job = running(respawn=True).die(1).recover().ready(3).feed(Timeout(), PausedAt(worker=0, epoch=2, step=4))
    _ = job.done
    job.die(2)
    assert job.done == [Quiesce(era=(3, 1), workers=(0,))], "it may be in the middle of an evaluation"
    job.recover()
    assert job.done[-3:] == [Announce(view=FakeView(3, 1, (0,))), Respawn(workers=(4,)), AskBoundary(workers=(0,))]
    job.ready(4)
    job.feed(PausedAt(worker=0, epoch=3, step=6))
    assert job.done == [Quiesce(era=(4, 1), workers=(0, 3, 4))]


def test_a_death_behind_a_boundary_leaves_the_joiners_for_the_next_one() -> None:
    job = at_boundary().inventories().proposed()
    _ = job.done
    job.die(2)
    assert job.done == [Quiesce(era=(3, 2), workers=(0,))]
    assert job.state.ready.keys() == {3}


def test_where_too_few_live_a_joiner_is_taken_in_without_a_boundary() -> None:
    job = running(min_workers=2, respawn=True).die(1).recover().ready(3)
    _ = job.done
    job.die(2)
    assert job.done == [Respawn(workers=(4,)), Quiesce(era=(3, 1), workers=(0, 3))]


def test_a_joiner_that_dies_during_a_recovery_is_replaced_behind_it() -> None:
    job = running(4, respawn=True).die(1).recover().die(2)
    _ = job.done
    job.die(4)
    assert job.done == [], "a new worker would take processor time from those who recover"
    job.recover()
    assert job.done[-1] == Respawn(workers=(5, 6))


def test_a_joiner_that_dies_early_is_nobodys_incident_and_is_replaced_a_few_times() -> None:
    job = running(respawn=True).die(1).recover()
    _ = job.done
    for number in range(3, 3 + FAILED_JOINS - 1):
        job.die(number)
        assert job.done == [Respawn(workers=(number + 1,))]
    job.die(3 + FAILED_JOINS - 1)
    assert "no more are started" in job.told
    assert job.done == []
    assert job.phase is Phase.RUNNING
    job.die(2)
    assert job.done == [Quiesce(era=(3, 1), workers=(0,))], "no more"


def test_a_step_committed_with_a_joiner_forgives_the_failed_ones() -> None:
    job = running(respawn=True).die(1).recover().die(3).ready(4).feed(Timeout())
    job.feed(PausedAt(worker=0, epoch=2, step=4), PausedAt(worker=2, epoch=2, step=4)).recover()
    assert job.state.failed_joins == 1
    job.feed(FirstCommit(worker=0, epoch=2, step=4))
    assert job.state.failed_joins == 1, "of another epoch"
    job.feed(FirstCommit(worker=0, epoch=3, step=5))
    assert (job.state.failed_joins, job.state.newcomers) == (0, frozenset())


def test_once_they_are_forgiven_those_who_are_missing_are_started() -> None:
    job = running(4, respawn=True).die(1).die(2).recover().die(4).die(6).ready(5).wait(GATHERING_S)
    job.feed(*(PausedAt(worker=worker, epoch=2, step=4) for worker in (0, 3))).die(7)
    assert (job.state.failed_joins, job.state.participants) == (FAILED_JOINS, {0, 3, 5})
    job.recover()
    assert isinstance(job.done[-1], Announce), "no more are started"
    job.feed(FirstCommit(worker=0, epoch=3, step=5), FirstCommit(worker=5, epoch=3, step=5))
    assert job.done == [Respawn(workers=(8,))]


def test_a_newcomer_that_dies_before_a_step_is_committed_counts_as_failed() -> None:
    job = running(respawn=True).die(1).recover().ready(3).feed(Timeout())
    job.feed(PausedAt(worker=0, epoch=2, step=4), PausedAt(worker=2, epoch=2, step=4)).recover().die(3)
    assert job.state.failed_joins == 1


def test_an_unknown_joiner_is_ignored() -> None:
    assert running().ready(8).state.ready == {}
    assert running().die(8).done == []


# Too few


def test_below_the_minimum_the_job_pauses_until_there_are_enough() -> None:
    job = running(3, min_workers=3, respawn=True).die(1).die(2)
    assert job.phase is Phase.PAUSED
    assert job.told.count("paused until new workers are ready") == 1
    assert job.done == [Respawn(workers=(3,)), Respawn(workers=(4,))]
    job.ready(3)
    assert job.done == []
    job.ready(4)
    assert job.done == [Quiesce(era=(2, 1), workers=(0, 3, 4))]


def test_below_the_minimum_with_nobody_to_come_the_job_ends() -> None:
    assert "2 workers left, and the job may not shrink below min_workers=3; none can be started (respawn is off)" in (
        running(3, min_workers=3).die(1).ended()
    )
    job = running(2, min_workers=2, respawn=True).die(1)
    assert "the job is stopping" in job.feed(Stopping()).die(2).ended()
    job = running(2, min_workers=2, respawn=True).die(1).die(2).die(3).die(4)
    assert "new workers die" in job.ended()


# The rung below replicas


def lost_state(job: Machine) -> Machine:
    """The attempt finds that some of the state is in nobody's memory."""
    return job.inventories().feed(Unproposable(era=job.state.era, kind="CoverageLost", message="layer 2 is gone"))


def saving(workers: int, **more: Any) -> Machine:
    job = running(workers, **more)
    job.state = replace(job.state, policy=replace(job.state.policy, checkpoints=True))
    return job


def test_what_nobody_has_is_read_from_the_newest_checkpoint() -> None:
    job = lost_state(saving(4).die(1).die(2))
    assert "layer 2 is gone: going back to the newest checkpoint" in job.told
    assert job.done[-1] == Quiesce(era=(2, 3), workers=(0, 3), restore=True)
    job.inventories()
    (propose,) = job.done
    assert isinstance(propose, Propose)
    assert propose.restore
    job.proposed().votes().committed()
    assert not job.state.fallen
    _ = job.done
    assert job.die(3).done == [Quiesce(era=(3, 1), workers=(0,))], "the next loss is one like others"


def test_without_a_checkpoint_the_job_ends_with_what_is_lost() -> None:
    job = lost_state(saving(4).die(1).die(2))
    assert "layer 2 is gone" in lost_state(job).ended()
    assert "layer 2 is gone" in lost_state(running(4).die(1).die(2)).ended(), "it saves none"


def test_a_death_on_the_way_back_leads_there_too() -> None:
    job = lost_state(saving(4).die(1).die(2)).inventories().proposed()
    _ = job.done
    assert job.die(3).done == [Quiesce(era=(2, 4), workers=(0,), restore=True)]


def test_when_all_have_died_new_workers_begin_with_the_checkpoint_together() -> None:
    job = saving(2, respawn=True).die(0).die(1)
    assert job.phase is Phase.PAUSED
    assert job.told.count("all workers died at once: no copy of the state is left: new workers begin with the newest checkpoint") == 1
    assert job.done[-1] == Respawn(workers=(2, 3))
    assert job.ready(3).done == [], "the other one is on its way"
    assert job.ready(2).done == [Quiesce(era=(2, 2), workers=(2, 3), restore=True)]
    job.inventories()
    (propose,) = job.done
    assert isinstance(propose, Propose)
    assert (set(propose.joiners), propose.restore) == ({2, 3}, True)
    job.proposed().votes().committed()
    assert (job.phase, job.state.view.workers, job.state.ready) == (Phase.RUNNING, (2, 3), {})


def test_of_new_workers_that_die_others_take_the_place() -> None:
    job = saving(2, respawn=True).die(0).die(1).die(2).ready(3)
    assert job.done[-1] == Respawn(workers=(4,))
    assert job.ready(4).done == [Quiesce(era=(2, 2), workers=(3, 4), restore=True)]


def test_a_damaged_checkpoint_is_nobodys_fault() -> None:
    """Workers that begin together were evicted for it, and the third such attempt ended the job."""
    job = saving(2, respawn=True).die(0).die(1).ready(2).ready(3)
    for attempt in range(2, 2 + FAILED_ATTEMPTS + 1):
        assert job.done[-1] == Quiesce(era=(2, attempt), workers=(2, 3), restore=True)
        job.inventories().proposed()
        refusal = Vote(worker=3, refusal="step-9/model: damaged", unreadable=True)
        job.feed(Voted(era=job.state.era, vote=refusal))
        assert "worker 3 cannot begin with the newest checkpoint, and an older one is tried: step-9/model: damaged" in job.told
    job.inventories().proposed().votes().committed()
    assert (job.phase, job.state.view.workers) == (Phase.RUNNING, (2, 3))


def test_founders_that_cannot_read_the_checkpoint_look_for_another_way_at_once() -> None:
    job = saving(3)
    job.feed(LostLink(reporter=1, peer=None, epoch=1, reason="step-9/model: damaged", unreadable=True))
    assert "worker 1 cannot begin with the newest checkpoint, and an older one is tried: step-9/model: damaged" in job.told
    assert job.done[-1] == Quiesce(era=(2, 1), workers=(0, 1, 2)), "the others may have copies of what it lacks"


def test_nobody_is_left_to_read_the_checkpoint() -> None:
    assert "none can be started (respawn is off)" in saving(2).die(0).die(1).ended()
    job = saving(1, respawn=True).die(0)
    for worker in range(1, FAILED_JOINS + 1):
        job.die(worker)
    assert "none can be started (new workers die)" in job.ended()


def nothing_saved(job: Machine) -> Machine:
    job.inventories()
    return job.feed(Unproposable(era=job.state.era, kind="NothingSaved", message="no good checkpoint has been saved yet"))


def test_before_the_first_checkpoint_new_workers_begin_again_at_step_0() -> None:
    job = saving(3, respawn=True).die(1).die(2).inventories()
    job.feed(Unproposable(era=job.state.era, kind="CoverageLost", message="no full copy"))
    nothing_saved(job)
    assert "The training begins again at step 0, from the seed" in job.told
    assert job.done[-1] == Evict(worker=0, why="the training begins again at step 0, with new workers")
    job.die(0)
    assert job.done == [Respawn(workers=(3, 4, 5))]
    job.ready(3).ready(4).ready(5)
    assert job.done == [Quiesce(era=(2, 4), workers=(3, 4, 5), restore=True)]
    job.inventories()
    (asked,) = job.done
    assert isinstance(asked, Propose)
    assert (asked.restore, asked.afresh, [*asked.joiners]) == (True, True, [3, 4, 5])
    job.proposed().votes().committed()
    assert (job.phase, job.state.fallen, job.state.afresh) == (Phase.RUNNING, False, False)


def test_if_all_died_before_the_first_checkpoint_those_that_are_ready_begin_at_step_0() -> None:
    job = saving(2, respawn=True).die(0).die(1).ready(2).ready(3)
    _ = job.done
    nothing_saved(job)
    assert job.done[-1] == Quiesce(era=(2, 3), workers=(2, 3), restore=True)
    job.inventories()
    (asked,) = job.done
    assert isinstance(asked, Propose)
    assert asked.afresh


def test_nobody_can_begin_again_if_none_are_started() -> None:
    job = saving(3).die(1).die(2).inventories()
    job.feed(Unproposable(era=job.state.era, kind="CoverageLost", message="no full copy"))
    assert "no good checkpoint has been saved yet" in nothing_saved(job).ended()


# The input


def test_an_input_that_has_ended_three_workers_ends_the_job() -> None:
    job = running(5)
    for epoch, worker in enumerate((1, 2, 3), 1):
        assert job.phase is Phase.RUNNING
        loss = Loss(worker=worker, epoch=epoch, step=12, micro_batch=3, layers=(0, 1), own=True)
        job.die(worker, loss=loss)
        if epoch < 3:
            job.recover()
    assert "micro-batch 3 of step 12 has ended every worker that computed it (1, 2, 3)" in job.ended()
    assert "worker 3 fell" in job.ended()


# The end


def test_when_some_have_finished_a_death_ends_the_job_unless_the_rest_finish() -> None:
    job = running().feed(Finished(worker=0)).die(1)
    assert (job.phase, job.done) == (Phase.CLOSING, [])
    job.wait(CLOSING_S / 2)
    assert job.phase is Phase.CLOSING
    assert job.wait(CLOSING_S / 2).ended() == "worker 1 fell"


def test_the_death_of_one_that_has_finished_matters_to_those_who_miss_it() -> None:
    job = running().feed(Finished(worker=0)).die(0)
    assert job.phase is Phase.RUNNING
    job = running().feed(Finished(worker=0), LostLink(reporter=1, peer=0, epoch=1))
    assert "lost worker 0, which had finished" in job.wait(CLOSING_S).ended()


@pytest.mark.parametrize("until", ["", "inventories", "inventories proposed"])
def test_who_finishes_during_an_attempt_leaves_it_without_a_way_on(until: str) -> None:
    job = running().die(1)
    for what in until.split():
        getattr(job, what)()
    assert job.feed(Finished(worker=0)).wait(CLOSING_S).ended() == "worker 1 fell"


@pytest.mark.parametrize("result", ["committed", "failed"])
def test_who_finishes_during_a_commit_leaves_the_job_without_a_way_on(result: str) -> None:
    job = running().die(1).inventories().proposed().votes().feed(Finished(worker=0))
    job.committed() if result == "committed" else job.feed(CommitFailed(era=(2, 1), reason="no"))
    assert job.wait(CLOSING_S).ended() == "worker 1 fell"


def test_a_boundary_that_the_training_does_not_reach() -> None:
    job = running(respawn=True).die(1).recover().ready(3).feed(Timeout(), Finished(worker=0))
    assert job.phase is Phase.RUNNING
    _ = job.done
    job.feed(Finished(worker=2)).wait(100)
    assert job.done == []


def test_a_stopping_job_starts_nobody_and_lets_nobody_in() -> None:
    job = running(respawn=True).die(1).recover()
    _ = job.done
    job.ready(3).feed(Stopping()).wait(GATHERING_S)
    assert job.done == []
    job.die(2)
    assert job.done == [Quiesce(era=(3, 1), workers=(0,))]
    job.recover().wait(GATHERING_S)
    assert [type(action) for action in job.done] == [Propose, Offer, Commit, Announce]


def test_who_keeps_the_others_waiting_is_named_once() -> None:
    job = running().die(1).feed(Inventoried(worker=0, era=(2, 1), inventory=Any))
    job.wait(PATIENCE_S).wait(PATIENCE_S)
    assert job.told.count("quiescing: waiting for workers [2]") == 1
