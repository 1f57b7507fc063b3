"""Tests the state machine branch by branch, with views that have only members, and a fake clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from elastic.control.attempt import PATIENCE_S, RETURN_S
from elastic.control.events import (
    Announce,
    Commit,
    CommitFailed,
    Committed,
    Evict,
    FirstCommit,
    Inventoried,
    LostLink,
    Offer,
    PausedAt,
    Propose,
    Proposed,
    Quiesce,
    Reopened,
    Respawn,
    Stopping,
    Timeout,
    Unproposable,
    Unresponsive,
    Vote,
    Voted,
    WorkerFinished,
)
from elastic.control.input_blame import MicroBatchLoss
from elastic.control.state import Phase
from elastic.control.transitions import CLOSING_S, GATHERING_S, SUSPICION_S
from tests.recovery.machines import FakeProposal, FakeView, Machine, at_boundary, running


@pytest.mark.parametrize("respawn", [True, False])
def test_a_view_is_brief_if_replacements_are_to_come(respawn: bool) -> None:
    *_, asked = running(respawn=respawn).die(1).inventories().done
    assert isinstance(asked, Propose)
    assert asked.brief is respawn


def test_workers_that_are_lost_with_their_host_cost_one_attempt() -> None:
    job = running(5).die(1, more=True).die(2, more=True).die(3)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 4))]
    job.die(0, more=True)
    assert (job.done, job.state.live) == ([], (4,))
    assert job.die(4).state.attempt_id == (2, 1), "nobody is left for another attempt"


def test_a_death_is_recovered_from_in_one_attempt() -> None:
    job = running().die(1)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 2))]
    job.inventories()
    assert job.done == [Propose(attempt_id=(2, 1), view=job.state.view, inventories={0: Any, 2: Any}, joiners={})]
    job.proposed()
    proposal = FakeProposal(FakeView(2, 1, (0, 2)))
    assert job.done == [Offer(attempt_id=(2, 1), proposal=proposal)]
    job.vote(0)
    assert job.done == []
    job.vote(2)
    assert job.done == [Commit(attempt_id=(2, 1), proposal=proposal, votes={0: Vote(worker=0), 2: Vote(worker=2)})]
    job.committed()
    assert job.done == [Announce(view=proposal.view)]
    assert (job.phase, job.state.attempt_id) == (Phase.RUNNING, (2, 1))
    job.die(2)
    assert job.done == [Quiesce(attempt_id=(3, 1), workers=(0,))]


def test_every_answer_of_another_era_is_ignored() -> None:
    job = running(4).die(1)
    stale = job.state.attempt_id
    job.inventories().die(2)
    assert job.state.attempt_id == (2, 2)
    view = FakeView(*stale, (0, 2, 3))
    before = job.state
    job.feed(
        Inventoried(worker=0, attempt_id=stale, inventory=Any),
        Proposed(attempt_id=stale, proposal=FakeProposal(view)),
        Unproposable(attempt_id=stale, kind="CoverageLost", message="all gone"),
        Voted(attempt_id=stale, vote=Vote(worker=0)),
        CommitFailed(attempt_id=stale, reason="late"),
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
    assert job.done == [Quiesce(attempt_id=(2, 2), workers=(0, 2))]
    job.recover()
    assert job.state.view == FakeView(2, 2, (0, 2))


def test_a_death_while_committing_waits_for_the_result_and_goes_on_from_it() -> None:
    job = running(4).die(1).inventories().proposed().votes()
    _ = job.done
    job.die(3)
    assert job.done == []
    job.committed()
    assert job.done == [Announce(view=FakeView(2, 1, (0, 2, 3))), Quiesce(attempt_id=(3, 1), workers=(0, 2))]


def test_a_death_while_a_commit_fails() -> None:
    job = running(4).die(1).inventories().proposed().votes().die(3)
    _ = job.done
    job.feed(CommitFailed(attempt_id=(2, 1), reason="refused"))
    assert job.done == [Quiesce(attempt_id=(2, 2), workers=(0, 2))]


def test_a_view_that_others_committed_is_adopted() -> None:
    job = running()
    view = FakeView(5, 2, (0, 1, 9))
    job.feed(Committed(view=view), Committed(view=view))
    assert job.done == [Announce(view=view)]
    assert job.state.next_worker == 10


def test_without_a_way_on_the_job_ends_with_the_reason_and_what_began_it() -> None:
    job = running().die(1).inventories().feed(Unproposable(attempt_id=(2, 1), kind="CoverageLost", message="layer 3 is gone"))
    assert "layer 3 is gone" in job.ended()
    assert "worker 1 fell" in job.ended()
    assert job.actions[-1].kind == "CoverageLost"
    assert job.die(0).feed(Stopping()).phase is Phase.ENDED


def test_all_dead() -> None:
    assert "all workers died at once: no copy of the state is left" in running(2).die(0).die(1).ended()
    alone = running(1).die(0)
    assert "it was the only worker: no copy of the state is left" in alone.ended()
    assert alone.actions[-1].kind == "CoverageLost"


def test_new_workers_take_over_from_all_that_died() -> None:
    job = running(2, outlive=True, respawn=True).die(0).die(1)
    assert "all workers died: new workers take over their memory" in job.told
    assert Respawn(workers=(2, 3)) in job.done
    assert job.phase is Phase.PAUSED
    assert Quiesce(attempt_id=(2, 2), workers=(2, 3)) in job.ready(2).ready(3).done
    job.feed(Inventoried(worker=2, attempt_id=(2, 2), inventory=None), Inventoried(worker=3, attempt_id=(2, 2), inventory=None))
    (proposed,) = job.done
    assert (proposed.restore, sorted(proposed.joiners)) == (False, [2, 3])


def test_after_failed_joins_new_workers_are_tried_again_if_only_they_can_take_over() -> None:
    job = running(2, outlive=True, respawn=True).die(1).recover().feed(FirstCommit(worker=0, epoch=2, step=5))
    while job.state.starting:
        job.die(max(job.state.starting))
    assert job.state.failed_joins == 3
    job.die(0)
    assert job.phase is Phase.PAUSED
    rounds = 0
    while job.state.starting:
        assert job.phase is Phase.PAUSED
        rounds += 1
        for worker in sorted(job.state.starting):
            job.die(worker)
    assert "new workers would take over their memory, but none can be started (new workers die)" in job.ended()
    assert 6 <= rounds <= 12


def test_state_on_a_host_without_members_is_fetched_by_new_workers_there() -> None:
    job = running(3, outlive=True, respawn=True).die(1).die(2).inventories()
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="lost", elsewhere=True))
    assert Respawn(workers=(3, 4)) in job.actions
    assert "new workers fetch it" in job.told
    assert job.phase is Phase.PAUSED
    _ = job.done
    assert job.ready(3).phase is Phase.PAUSED, "those that were started with it are awaited"
    assert Quiesce(attempt_id=(2, 3), workers=(0, 3, 4)) in job.ready(4).done
    job.inventories()
    assert sorted(job.done[-1].joiners) == [3, 4]
    job.proposed().votes().committed()
    assert not job.state.reaching


def lacking(**more: Any) -> Machine:
    """A job of which two hosts are lost, one of them silent; the third lacks a part of the state."""
    job = running(3, hosts=True, **more).die(1).die(2).inventories()
    return job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="no copy of layer 3", returning=True))


def test_hosts_that_are_silent_are_awaited_if_they_may_have_what_the_others_lack() -> None:
    job = lacking(checkpoints=True)
    assert "no copy of layer 3. Hosts that are silent may have it: the job waits 30 s" in job.told
    assert (job.phase, job.state.wake_at) == (Phase.PAUSED, job.now + RETURN_S)
    _ = job.done
    assert job.feed(Reopened()).done == [Quiesce(attempt_id=(2, 3), workers=(0,))], "one is back"
    job.inventories().proposed().votes().committed()
    assert (job.state.return_at, job.state.awaited) == (None, False)
    assert job.wait(RETURN_S).phase is Phase.RUNNING


def test_an_attempt_meanwhile_does_not_shorten_the_wait_and_nothing_is_awaited_twice() -> None:
    job = lacking(checkpoints=True)
    until = job.state.wake_at
    job.wait(RETURN_S / 2).feed(Reopened()).inventories()
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="still no copy", returning=True))
    assert (job.phase, job.state.wake_at) == (Phase.PAUSED, until)
    job.wait(RETURN_S / 2).inventories()
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="none came back", returning=True))
    assert "none came back: going back to the newest checkpoint" in job.told
    assert job.state.fallen


def test_a_job_without_checkpoints_ends_if_no_silent_host_comes_back() -> None:
    job = lacking().wait(RETURN_S).inventories()
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="none came back", returning=True))
    assert "none came back" in job.ended()


def test_state_on_a_host_without_members_is_lost_if_no_worker_can_be_started_there() -> None:
    job = running(3, outlive=True, respawn=True).die(1).die(2).inventories()
    while True:
        job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="nobody has it", elsewhere=True))
        if job.phase is Phase.ENDED:
            break
        for worker in sorted(job.state.starting):
            job.die(worker)
        job.inventories()
    assert "nobody has it" in job.ended()


def test_a_new_coordinator_opens_no_attempt_once_a_worker_has_finished() -> None:
    job = running(2).feed(WorkerFinished(worker=0), Reopened())
    assert (job.phase, job.done) == (Phase.RUNNING, [])
    job.state = dataclasses.replace(job.state, attempt=3)  # one was under way
    assert job.feed(Reopened()).phase is Phase.CLOSING


def test_nobody_takes_over_from_all_that_died_where_none_is_started() -> None:
    job = running(2, outlive=True).die(0).die(1)
    assert "new workers would take over their memory, but none can be started (respawn is off)" in job.ended()


def test_all_that_died_have_left_nothing_and_nothing_was_saved() -> None:
    job = running(2, outlive=True, respawn=True, checkpoints=True).die(0).die(1).ready(2).ready(3)
    job.feed(Inventoried(worker=2, attempt_id=(2, 2), inventory=None), Inventoried(worker=3, attempt_id=(2, 2), inventory=None))
    _ = job.done
    job.feed(Unproposable(attempt_id=(2, 2), kind="CoverageLost", message="nothing is left"))
    assert Quiesce(attempt_id=(2, 3), workers=(2, 3), restore=True) in job.done


def test_commits_that_fail_are_tried_again_but_not_for_ever() -> None:
    job = running().die(1)
    for attempt in (1, 2):
        assert job.state.attempt_id == (2, attempt)
        job.inventories().feed(CommitFailed(attempt_id=job.state.attempt_id, reason="somebody else coordinates"))
    assert "somebody else coordinates; the workers try again (failure 2 of 3 at epoch 2)" in job.told
    job.inventories().proposed().votes().feed(CommitFailed(attempt_id=(2, 3), reason="again"))
    assert "epoch 2 was not reached in 3 attempts; the last failure: again" in job.ended()


# Votes


def test_a_refusal_opens_the_next_attempt_and_says_why() -> None:
    job = running().die(1).inventories().proposed().vote(0)
    _ = job.done
    job.vote(2, refusal="digest of layer 1 differs")
    assert "worker 2 rejected the proposal: digest of layer 1 differs" in job.told
    assert job.done == [Quiesce(attempt_id=(2, 2), workers=(0, 2))]


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
    assert job.done == [Quiesce(attempt_id=(2, 2), workers=(0, 2))]


def test_a_joiner_that_refuses_is_evicted_and_the_others_go_on() -> None:
    job = at_boundary().inventories().proposed()
    assert job.state.participants == {0, 2, 3}
    _ = job.done
    job.vote(3, refusal="out of memory")
    assert job.done == [Evict(worker=3, why="out of memory")]
    job.die(3)
    assert job.done == [Quiesce(attempt_id=(3, 2), workers=(0, 2))]
    job.recover()
    assert job.done[-1] == Respawn(workers=(4,))


# Lost links


def test_a_lost_peer_that_dies_in_time_is_an_ordinary_death() -> None:
    job = running().feed(LostLink(reporter=0, peer=1, epoch=1))
    assert job.state.wake_at == job.now + SUSPICION_S
    job.die(1).wait(SUSPICION_S)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 2))]


def damaged(worker: int, epoch: int = 1) -> LostLink:
    return LostLink(reporter=worker, peer=None, epoch=epoch, reason=f"worker {worker}: its memory has changed", damaged=True)


def test_a_member_with_damaged_copies_goes_on_with_the_others_at_once_and_all_hear_of_it() -> None:
    job = running().feed(damaged(1))
    assert job.told == "worker 1: its memory has changed"
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 1, 2), damaged=(1,))]
    job.feed(damaged(2))  # found while it made its inventory, which arrives later
    assert job.done == [Quiesce(attempt_id=(2, 2), workers=(0, 1, 2), damaged=(1, 2))]
    job.recover().done  # noqa: B018
    job.die(0)
    assert job.done == [Quiesce(attempt_id=(3, 1), workers=(1, 2))], "what they hold in the next view is good"


def test_damage_of_another_view_or_of_the_dead_is_nobodys() -> None:
    assert running().feed(damaged(1, epoch=0)).done == []
    job = running().die(1)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 2))]
    assert job.feed(damaged(1)).done == []


def test_damage_that_nobody_has_another_copy_of_is_named_at_the_end() -> None:
    job = running(1).feed(damaged(0)).inventories()
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="no copy of layer 3"))
    why = job.ended()
    assert "cannot go on: no copy of layer 3. The job saved no checkpoint, so it begins at step 0 if it is started again" in why
    assert "its memory has changed" in why


def test_a_lost_peer_that_lives_on_is_evicted() -> None:
    job = running().feed(LostLink(reporter=0, peer=1, epoch=1)).wait(SUSPICION_S)
    assert job.done == [Evict(worker=1, why="workers [0] lost their links to it, and its process still runs after 1 s")]


def test_of_two_that_lost_each_other_only_one_is_evicted() -> None:
    job = running().feed(LostLink(reporter=0, peer=1, epoch=1), LostLink(reporter=1, peer=0, epoch=1)).wait(SUSPICION_S).wait(5)
    assert [action.worker for action in job.done] == [1]


def test_the_one_whom_most_have_lost_is_evicted() -> None:
    lost = [LostLink(reporter=0, peer=1, epoch=1), LostLink(reporter=0, peer=2, epoch=1), LostLink(reporter=1, peer=0, epoch=1)]
    job = running().feed(*lost, LostLink(reporter=2, peer=0, epoch=1)).wait(SUSPICION_S).wait(5)
    assert [action.worker for action in job.done] == [0]


@pytest.mark.parametrize("lost", [(0, 0, 1), (0, 1, 2), (7, 0, 1)])
def test_a_loss_that_cannot_be_is_ignored(lost: tuple[int, int, int]) -> None:
    reporter, peer, epoch = lost
    assert running().feed(LostLink(reporter=reporter, peer=peer, epoch=epoch)).state.wake_at is None


def test_the_loss_of_one_that_is_no_member_is_no_reason_but_the_reporter_has_stopped() -> None:
    """It waits for orders, as a worker that cannot say why."""
    job = running().feed(LostLink(reporter=0, peer=7, epoch=1))
    assert job.state.retry is not None


def test_a_worker_that_stopped_for_no_known_reason_is_taken_along_again() -> None:
    job = running().feed(LostLink(reporter=0, peer=None, epoch=1, reason="a digest differs")).wait(SUSPICION_S)
    assert "worker 0 cannot go on: a digest differs" in job.told
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 1, 2))]
    assert job.state.retry is None
    job = running().feed(LostLink(reporter=0, peer=None, epoch=1)).die(1).wait(SUSPICION_S)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 2))], "a death explains it"


def test_links_lost_while_an_attempt_is_under_way_are_expected() -> None:
    job = running().feed(LostLink(reporter=0, peer=2, epoch=1)).die(1).feed(LostLink(reporter=2, peer=0, epoch=1))
    assert job.state.suspects == {}


# The input


def test_an_input_that_has_ended_three_workers_ends_the_job() -> None:
    job = running(5)
    for epoch, worker in enumerate((1, 2, 3), 1):
        assert job.phase is Phase.RUNNING
        loss = MicroBatchLoss(worker=worker, epoch=epoch, step=12, micro_batch=3, layers=(0, 1), own=True)
        job.die(worker, loss=loss)
        if epoch < 3:
            job.recover()
    assert "micro-batch 3 of step 12 has ended or hung every worker that computed it (1, 2, 3)" in job.ended()
    assert "worker 3 fell" in job.ended()


# The end


def test_when_some_have_finished_a_death_ends_the_job_unless_the_rest_finish() -> None:
    job = running().feed(WorkerFinished(worker=0)).die(1)
    assert (job.phase, job.done) == (Phase.CLOSING, [])
    job.wait(CLOSING_S / 2)
    assert job.phase is Phase.CLOSING
    assert job.wait(CLOSING_S / 2).ended() == "worker 1 fell"


def test_the_death_of_one_that_has_finished_matters_to_those_who_miss_it() -> None:
    job = running().feed(WorkerFinished(worker=0)).die(0)
    assert job.phase is Phase.RUNNING
    job = running().feed(WorkerFinished(worker=0), LostLink(reporter=1, peer=0, epoch=1))
    assert "lost worker 0, which had finished" in job.wait(CLOSING_S).ended()


@pytest.mark.parametrize("until", ["", "inventories", "inventories proposed"])
def test_who_finishes_during_an_attempt_leaves_it_without_a_way_on(until: str) -> None:
    job = running().die(1)
    for what in until.split():
        getattr(job, what)()
    assert job.feed(WorkerFinished(worker=0)).wait(CLOSING_S).ended() == "worker 1 fell"


@pytest.mark.parametrize("result", ["committed", "failed"])
def test_who_finishes_during_a_commit_leaves_the_job_without_a_way_on(result: str) -> None:
    job = running().die(1).inventories().proposed().votes().feed(WorkerFinished(worker=0))
    job.committed() if result == "committed" else job.feed(CommitFailed(attempt_id=(2, 1), reason="no"))
    assert job.wait(CLOSING_S).ended() == "worker 1 fell"


def test_a_boundary_that_the_training_does_not_reach() -> None:
    job = running(respawn=True).die(1).recover().ready(3).feed(Timeout(), WorkerFinished(worker=0))
    assert job.phase is Phase.RUNNING
    _ = job.done
    job.feed(WorkerFinished(worker=2)).wait(100)
    assert job.done == []


def test_a_stopping_job_starts_nobody_and_lets_nobody_in() -> None:
    job = running(respawn=True).die(1).recover()
    _ = job.done
    job.ready(3).feed(Stopping()).wait(GATHERING_S)
    assert job.done == []
    job.die(2)
    assert job.done == [Quiesce(attempt_id=(3, 1), workers=(0,))]
    job.recover().wait(GATHERING_S)
    assert [type(action) for action in job.done] == [Propose, Offer, Commit, Announce]


def test_who_keeps_the_others_waiting_is_named_once() -> None:
    job = running().die(1).feed(Inventoried(worker=0, attempt_id=(2, 1), inventory=Any))
    job.wait(PATIENCE_S).wait(PATIENCE_S)
    assert job.told.count("waiting for workers [2] for over 10 s (quiescing)") == 1


@pytest.mark.parametrize(("worker", "evicted"), [(1, True), (9, False)])
def test_a_worker_that_does_not_run_is_evicted_if_the_others_wait_for_it(worker: int, evicted: bool) -> None:
    job = running().feed(Unresponsive(worker=worker, why="stopped"))
    assert job.done == [Evict(worker=worker, why="stopped")] * evicted
    job.feed(Unresponsive(worker=worker, why="stopped"))
    assert job.done == []


def test_a_worker_that_does_not_run_in_a_recovery_is_evicted_too() -> None:
    job = running().die(1).feed(Unresponsive(worker=2, why="stopped"))
    assert job.done[-1] == Evict(worker=2, why="stopped")


def test_a_worker_that_has_finished_is_not_waited_for() -> None:
    assert running().feed(WorkerFinished(worker=1)).feed(Unresponsive(worker=1, why="stopped")).done == []
