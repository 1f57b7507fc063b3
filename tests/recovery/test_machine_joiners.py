"""Tests the state machine: workers that join, too few workers, and checkpoints instead of copies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from elastic.control.attempt import FAILED_ATTEMPTS, SETTLING_S
from elastic.control.events import (
    Announce,
    AskBoundary,
    EndJob,
    Evict,
    FirstCommit,
    LostLink,
    PausedAt,
    Propose,
    Quiesce,
    Respawn,
    Room,
    Stopping,
    Timeout,
    Unproposable,
    Vote,
    Voted,
)
from elastic.control.state import Phase
from elastic.control.transitions import FAILED_JOINS, GATHERING_S, JOIN_PAUSE_S, LONGEST_JOIN_PAUSE_S, failed_join
from tests.recovery.machines import FakeView, Machine, at_boundary, running

# Joiners


def test_a_replacement_is_started_behind_the_recovery_and_joins_at_a_boundary() -> None:
    job = running(respawn=True).die(1)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 2))]
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
    assert job.done == [Quiesce(attempt_id=(3, 1), workers=(0, 2, 3))]
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
    assert job.done == [Quiesce(attempt_id=(3, 1), workers=(0,))], "it may be in the middle of an evaluation"
    job.recover()
    assert job.done[-3:] == [Announce(view=FakeView(3, 1, (0,))), Respawn(workers=(4,)), AskBoundary(workers=(0,))]
    job.ready(4)
    job.feed(PausedAt(worker=0, epoch=3, step=6))
    assert job.done == [Quiesce(attempt_id=(4, 1), workers=(0, 3, 4))]


def test_a_death_behind_a_boundary_leaves_the_joiners_for_the_next_one() -> None:
    job = at_boundary().inventories().proposed()
    _ = job.done
    job.die(2)
    assert job.done == [Quiesce(attempt_id=(3, 2), workers=(0,))]
    assert job.state.ready.keys() == {3}


def test_where_too_few_live_a_joiner_is_taken_in_without_a_boundary() -> None:
    job = running(min_workers=2, respawn=True).die(1).recover().ready(3)
    _ = job.done
    job.die(2)
    assert job.done == [Respawn(workers=(4,)), Quiesce(attempt_id=(3, 1), workers=(0, 3))]


def does_not_fit(job: Machine) -> Machine:
    return job.inventories().feed(Unproposable(attempt_id=job.state.attempt_id, kind="PlanError", message="layer 2 does not fit"))


def test_a_model_that_does_not_fit_on_those_that_are_left_waits_for_new_workers() -> None:
    job = does_not_fit(running(4, respawn=True).die(1).die(2))
    assert job.done[-1] == Respawn(workers=(4, 5))
    assert job.phase is Phase.PAUSED
    assert job.ready(4).done == [Quiesce(attempt_id=(2, 3), workers=(0, 3, 4))]
    does_not_fit(job)
    assert "paused until new workers are ready: 3 workers left, and layer 2 does not fit" in job.told
    _ = job.done
    assert job.ready(5).done == [Quiesce(attempt_id=(2, 4), workers=(0, 3, 4, 5))]
    assert job.recover().state.view.workers == (0, 3, 4, 5)
    assert job.state.misfit is None


def test_a_model_that_does_not_fit_any_more_ends_the_job_only_if_nobody_can_join() -> None:
    job = does_not_fit(running(3).die(1))
    assert [action.kind for action in job.actions if isinstance(action, EndJob)] == ["PlanError"]
    assert "2 workers left, and layer 2 does not fit; none can be started (respawn is off)" in job.ended()
    assert does_not_fit(running(3, hosts=True).die(1)).phase is Phase.PAUSED
    dying = does_not_fit(running(3, respawn=True).die(1))
    for number in range(3, 3 + FAILED_JOINS):
        dying.die(number)
    assert "none can be started (new workers die)" in dying.ended()


def test_new_workers_with_whom_the_model_does_not_fit_do_not_join() -> None:
    job = running(2, respawn=True).feed(Room(workers=3, spares=0, rooms={}))
    assert job.done == [Respawn(workers=(2,))]
    _ = job.ready(2).wait(GATHERING_S).feed(*(PausedAt(worker=each, epoch=1, step=5) for each in (0, 1))).done
    does_not_fit(job)
    assert "workers [2] cannot join, and the job stays at 2: layer 2 does not fit" in job.told
    assert job.done[-2:] == [Evict(worker=2, why="the model does not fit with it"), Quiesce(attempt_id=(2, 2), workers=(0, 1))]
    assert job.recover().die(2).done[-1] == Announce(view=job.state.view, spares=())


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
    assert job.done == [Quiesce(attempt_id=(3, 1), workers=(0,))], "no more"


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


def test_a_newcomer_whose_death_is_one_too_many_is_told_too() -> None:
    """Found by a soak: a job was without a worker for ever, and nobody was told."""
    job = running(respawn=True).die(1).recover().die(3).die(4).ready(5).feed(Timeout())
    job.feed(PausedAt(worker=0, epoch=2, step=4), PausedAt(worker=2, epoch=2, step=4)).recover()
    _ = job.done
    job.die(5)
    assert "3 new workers have died before a step was committed with new ones: no more are started for 30 s" in job.told
    job.recover()
    assert not any(isinstance(action, Respawn) for action in job.done)
    assert Respawn(workers=(6,)) in job.wait(JOIN_PAUSE_S).done


def test_new_workers_are_tried_again_after_a_while_which_doubles_until_one_trains() -> None:
    job = running(respawn=True).die(1).recover().die(3).die(4).die(5)
    pauses = []
    for worker in range(6, 13):
        _ = job.done
        started = job.now
        while not job.done:
            job.wait(1.0)
        pauses.append(round(job.now - started))
        job.die(worker)
    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    job.state = replace(job.state, join_pauses=5000, failed_joins=FAILED_JOINS - 1)  # as after a month
    assert failed_join(job.state, job.state.next_worker, 0.0)[0].joins_from == LONGEST_JOIN_PAUSE_S
    job.state = replace(job.state, failed_joins=FAILED_JOINS)
    assert "another new worker has died before a step was committed with new ones: no more are started for 600 s" in job.told
    job.wait(LONGEST_JOIN_PAUSE_S).ready(13).wait(GATHERING_S)
    job.feed(PausedAt(worker=0, epoch=2, step=4), PausedAt(worker=2, epoch=2, step=4)).recover()
    job.feed(FirstCommit(worker=0, epoch=3, step=5))
    assert (job.state.failed_joins, job.state.join_pauses, job.state.joins_from) == (0, 0, None)
    _ = job.die(13).recover().done
    assert job.state.failed_joins == 0


@pytest.mark.parametrize("joined", [False, True])
def test_new_workers_that_are_killed_together_count_once(joined: bool) -> None:
    """A job of three workers ended when all were killed, and all new ones too."""
    job = saving(3, respawn=True).die(0).die(1).die(2)
    if joined:
        job.ready(3).ready(4).ready(5).inventories().proposed().votes().committed()
    job.die(4).die(3).die(5)
    assert job.phase is not Phase.ENDED
    assert job.state.failed_joins == 1
    assert job.state.starting == {6, 7, 8}
    job.die(7)
    assert (job.state.failed_joins, job.state.starting) == (2, {6, 8, 9})
    job.die(9)
    assert "no more are started" in job.told
    assert (job.state.failed_joins, job.state.starting) == (FAILED_JOINS, {6, 8})
    job.die(8)
    assert job.told.count("no more are started") == 1
    assert "new workers die" in job.die(6).ended()


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
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 3, 4))]


def test_below_the_minimum_with_nobody_to_come_the_job_ends() -> None:
    assert "2 workers left, and the job may not shrink below min_workers=3; none can be started (respawn is off)" in (
        running(3, min_workers=3).die(1).ended()
    )
    job = running(2, min_workers=2, respawn=True).die(1)
    assert "the job is stopping" in job.feed(Stopping()).die(2).ended()
    job = running(2, min_workers=2, respawn=True).die(1).die(2).die(3).die(4)
    assert "new workers die" in job.ended()


# The fallback below replicas


def lost_state(job: Machine) -> Machine:
    """The attempt finds that no worker holds some of the state."""
    return job.inventories().feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="layer 2 is gone"))


def saving(workers: int, **more: Any) -> Machine:
    job = running(workers, **more)
    job.state = replace(job.state, policy=replace(job.state.policy, checkpoints=True))
    return job


def test_what_nobody_has_is_read_from_the_newest_checkpoint() -> None:
    job = lost_state(saving(4).die(1).die(2))
    assert "layer 2 is gone: going back to the newest checkpoint" in job.told
    assert job.done[-1] == Quiesce(attempt_id=(2, 3), workers=(0, 3), restore=True)
    job.inventories()
    (propose,) = job.done
    assert isinstance(propose, Propose)
    assert propose.restore
    job.proposed().votes().committed()
    assert not job.state.fallen
    _ = job.done
    assert job.die(3).done == [Quiesce(attempt_id=(3, 1), workers=(0,))], "the next loss is one like others"


def test_without_a_checkpoint_the_job_ends_with_what_is_lost() -> None:
    job = lost_state(saving(4).die(1).die(2))
    assert "layer 2 is gone" in lost_state(job).ended()
    assert "layer 2 is gone" in lost_state(running(4).die(1).die(2)).ended(), "it saves none"


def test_a_death_on_the_way_back_leads_there_too() -> None:
    job = lost_state(saving(4).die(1).die(2)).inventories().proposed()
    _ = job.done
    assert job.die(3).done == [Quiesce(attempt_id=(2, 4), workers=(0,), restore=True)]


def test_when_all_have_died_new_workers_begin_with_the_checkpoint_together() -> None:
    job = saving(2, respawn=True).die(0).die(1)
    assert job.phase is Phase.PAUSED
    how = "new workers begin with the newest checkpoint, or at step 0 where there is none"
    assert job.told.count(f"all workers died at once: no copy of the state is left: {how}") == 1
    assert job.done[-1] == Respawn(workers=(2, 3))
    assert job.ready(3).done == [], "the other one is on its way"
    assert job.ready(2).done == [Quiesce(attempt_id=(2, 2), workers=(2, 3), restore=True)]
    job.inventories()
    (propose,) = job.done
    assert isinstance(propose, Propose)
    assert (set(propose.joiners), propose.restore) == ({2, 3}, True)
    job.proposed().votes().committed()
    assert (job.phase, job.state.view.workers, job.state.ready) == (Phase.RUNNING, (2, 3), {})


def test_of_new_workers_that_die_others_take_the_place() -> None:
    job = saving(2, respawn=True).die(0).die(1).die(2).ready(3)
    assert job.done[-1] == Respawn(workers=(4,))
    assert job.ready(4).done == [Quiesce(attempt_id=(2, 2), workers=(3, 4), restore=True)]


def test_a_damaged_checkpoint_is_nobodys_fault() -> None:
    """Workers that begin together were evicted for it, and the third such attempt ended the job."""
    job = saving(2, respawn=True).die(0).die(1).ready(2).ready(3)
    for attempt in range(2, 2 + FAILED_ATTEMPTS + 1):
        assert job.done[-1] == Quiesce(attempt_id=(2, attempt), workers=(2, 3), restore=True)
        job.inventories().proposed()
        refusal = Vote(worker=3, refusal="step-9/model: damaged", unreadable=True)
        job.feed(Voted(attempt_id=job.state.attempt_id, vote=refusal))
        assert "worker 3 cannot read the newest checkpoint; all workers try an older one: step-9/model: damaged" in job.told
    job.inventories().proposed().votes().committed()
    assert (job.phase, job.state.view.workers) == (Phase.RUNNING, (2, 3))


def test_founders_that_cannot_read_the_checkpoint_look_for_another_way_at_once() -> None:
    job = saving(3)
    job.feed(LostLink(reporter=1, peer=None, epoch=1, reason="step-9/model: damaged", unreadable=True))
    assert "worker 1 cannot read the newest checkpoint; all workers try an older one: step-9/model: damaged" in job.told
    assert job.done[-1] == Quiesce(attempt_id=(2, 1), workers=(0, 1, 2)), "the others may have copies of what it lacks"


def test_nobody_is_left_to_read_the_checkpoint() -> None:
    assert "none can be started (respawn is off)" in saving(2).die(0).die(1).ended()
    job = saving(1, respawn=True).die(0)
    for worker in range(1, FAILED_JOINS + 1):
        job.die(worker)
    assert "none can be started (new workers die)" in job.ended()


def nothing_saved(job: Machine) -> Machine:
    job.inventories()
    return job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="NothingSaved", message="no good checkpoint has been saved yet"))


def begins_afresh(job: Machine) -> None:
    """Three new workers begin at step 0, and the job runs."""
    job.inventories()
    (asked,) = job.done
    assert isinstance(asked, Propose)
    assert (asked.restore, asked.afresh, [*asked.joiners]) == (True, True, [3, 4, 5])
    job.proposed().votes().committed()
    assert (job.phase, job.state.fallen, job.state.afresh) == (Phase.RUNNING, False, False)


def test_before_the_first_checkpoint_new_workers_begin_again_at_step_0() -> None:
    job = saving(3, respawn=True).die(1).die(2).inventories()
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="no full copy"))
    nothing_saved(job)
    assert "The training begins again at step 0, from the seed" in job.told
    assert job.done[-1] == Evict(worker=0, why="the training begins again at step 0, with new workers")
    job.die(0)
    assert job.done == [Respawn(workers=(3, 4, 5))]
    job.ready(3).ready(4).ready(5)
    assert job.done == [Quiesce(attempt_id=(2, 4), workers=(3, 4, 5), restore=True)]
    begins_afresh(job)


def test_if_all_died_before_the_first_checkpoint_those_that_are_ready_begin_at_step_0() -> None:
    job = saving(2, respawn=True).die(0).die(1).ready(2).ready(3)
    _ = job.done
    nothing_saved(job)
    assert job.done[-1] == Quiesce(attempt_id=(2, 3), workers=(2, 3), restore=True)
    job.inventories()
    (asked,) = job.done
    assert isinstance(asked, Propose)
    assert asked.afresh


def unbegun(job: Machine) -> Machine:
    job.inventories()
    lacks = "no full copy of step -1"
    return job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message=lacks, unbegun=True))


def test_if_a_founder_died_before_it_had_its_part_new_workers_begin_at_step_0() -> None:
    job = unbegun(running(3, respawn=True).die(1))
    assert "no full copy of step -1" in job.told
    assert "The training begins again at step 0, from the seed" in job.told
    job.die(0).die(2)
    assert Respawn(workers=(3, 4, 5)) in job.done
    job.ready(3).ready(4).ready(5)
    assert job.done == [Quiesce(attempt_id=(2, 2), workers=(3, 4, 5), restore=True)]
    begins_afresh(job)


def test_a_founder_is_missed_that_died_before_it_had_its_part_if_none_are_started() -> None:
    assert "no full copy of step -1" in unbegun(running(3).die(1)).ended()


def test_nobody_can_begin_again_if_none_are_started() -> None:
    job = saving(3).die(1).die(2).inventories()
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="no full copy"))
    assert "no good checkpoint has been saved yet" in nothing_saved(job).ended()
