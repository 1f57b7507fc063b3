"""Tests the state machine: spares, which join with the loss that they replace, and where on several hosts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from elastic.control.attempt import SETTLING_S
from elastic.control.events import (
    Announce,
    AskBoundary,
    Draining,
    Evict,
    FirstCommit,
    JoinerReady,
    PausedAt,
    Quiesce,
    Respawn,
    Room,
    Stopping,
    Timeout,
    Unable,
    Unproposable,
)
from elastic.control.spares import DEATHS, FORGIVEN_S
from elastic.control.state import Phase
from elastic.control.transitions import GATHERING_S
from elastic.view import Member
from tests.recovery.machines import FakeView, Machine, running


def with_spare(workers: int = 3, spares: int = 1, **policy: Any) -> Machine:
    """A job whose spares are ready."""
    job = running(workers, respawn=True, spares=spares, **policy)
    job.feed(FirstCommit(worker=0, epoch=1, step=0))
    for number in range(workers, workers + spares):
        job.ready(number)
    _ = job.done
    return job


@dataclass(frozen=True)
class TwoHosts(FakeView):
    """Workers of host `b` have odd numbers, all others are on `a`."""

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(member_of(worker) for worker in self.workers)


def member_of(worker: int) -> Member:
    return Member(worker=worker, host="b" if worker % 2 else "a", address=f"unix:{worker}", segment=True)


def on_two_hosts() -> Machine:
    """Two members and a spare on each host; spares are 4 and 5."""
    job = with_spare(4, 0, rooms={"a": 2, "b": 2})
    job.state = replace(job.state, view=TwoHosts(1, 0, (0, 1, 2, 3)))
    job.feed(Room(workers=4, spares=2, rooms={"a": 2, "b": 2}))
    assert job.done == [Respawn(workers=(4, 5))]
    return ready(job, 4, 5)


def ready(job: Machine, *workers: int) -> Machine:
    return job.feed(*(JoinerReady(worker=worker, member=member_of(worker)) for worker in workers))


def pause(job: Machine) -> Machine:
    return job.feed(*(PausedAt(worker=worker, epoch=job.state.view.epoch, step=7) for worker in job.state.live))


def lose(job: Machine, *workers: int) -> tuple[int, ...]:
    """The participants of the attempt after these deaths."""
    for worker in workers:
        job.die(worker)
    (*_, last) = [action for action in job.done if isinstance(action, Quiesce)]
    return last.workers


def on_hosts(job: Machine) -> Machine:
    """The attempt under way succeeds."""
    job.inventories().proposed().votes()
    view = job.state.proposal.view  # type: ignore[union-attr]
    job.state = replace(job.state, proposal=replace(job.state.proposal, view=TwoHosts(view.epoch, view.attempt, view.workers)))
    return job.committed()


# Start


def test_spares_are_started_when_the_first_step_is_committed() -> None:
    job = running(respawn=True, spares=2)
    job.feed(Room(workers=3, spares=2))
    assert job.done == []
    job.feed(FirstCommit(worker=0, epoch=1, step=0))
    assert job.done == [Respawn(workers=(3, 4))]
    assert job.ready(3).ready(4).wait(1.0).done == [], "nobody is missing"
    assert job.state.spares == {3, 4}


def test_spares_do_not_wait_for_a_long_step() -> None:
    job = running(respawn=True, spares=1)
    job.now = job.state.wake_at or 0.0
    assert job.feed(Timeout()).done == [Respawn(workers=(3,))]


# Loss


def test_a_spare_joins_in_the_attempt_of_the_loss_and_is_replaced_behind_it() -> None:
    job = with_spare().die(1)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 2, 3))]
    job.inventories().proposed().votes()
    _ = job.done
    job.committed()
    assert job.done == [Announce(view=FakeView(2, 1, (0, 2, 3)), spares=(3,))]
    job.feed(FirstCommit(worker=0, epoch=2, step=4))
    assert job.done == [Respawn(workers=(4,))]
    job.ready(4)
    assert job.state.spares == {4}


def test_more_die_than_there_are_spares() -> None:
    job = with_spare(4)
    assert lose(job, 1) == (0, 2, 3, 4)
    assert lose(job, 2) == (0, 3, 4)
    job.recover()
    assert job.done[-1] == Respawn(workers=(5, 6)), "the worker that is missing, and a spare"
    job.ready(5)
    assert job.state.spares == set()
    job.ready(6).feed(Timeout())
    assert job.state.spares == {6}
    assert job.done == [AskBoundary(workers=(0, 3, 4))]
    assert pause(job).done == [Quiesce(attempt_id=(3, 1), workers=(0, 3, 4, 5))]


def test_a_spare_that_dies_in_the_attempt_is_left_out_of_the_next() -> None:
    job = with_spare(4)
    lose(job, 1)
    assert lose(job, 4) == (0, 2, 3)
    job.recover()
    assert job.done[-1] == Respawn(workers=(5, 6))


def test_a_spare_saves_a_job_that_may_not_shrink() -> None:
    job = with_spare(2, min_workers=2)
    assert lose(job, 0) == (1, 2)
    assert lose(with_spare(2), 0, 1)  # all of them
    assert job.phase is Phase.QUIESCING


def test_all_members_die_and_a_spare_takes_over_with_new_workers() -> None:
    job = with_spare(3, outlive=True).die(0).die(1).die(2)
    assert job.done[-1] == Respawn(workers=(4, 5)), "not more: nobody waits for a spare"
    assert job.phase is Phase.PAUSED
    job.ready(4).ready(5)
    assert job.done == [Quiesce(attempt_id=(2, job.state.attempt), workers=(3, 4, 5))]


# What a spare must not do


@pytest.mark.parametrize("stopped", [True, False])
def test_a_spare_that_cannot_join_is_not_chosen(stopped: bool) -> None:
    job = with_spare(spares=2).feed(Unable(workers=frozenset({3})))
    job.state = replace(job.state, evicted=frozenset() if stopped else frozenset({3}))
    assert lose(job, 1) == (0, 2, 4)


def test_where_no_spare_can_join_another_worker_is_started_for_a_job_that_is_too_small() -> None:
    job = with_spare(2, min_workers=2).feed(Unable(workers=frozenset({2}))).die(1)
    assert job.done == [Respawn(workers=(3,))]
    assert job.phase is Phase.PAUSED
    job.ready(3)
    assert job.done == [Quiesce(attempt_id=(2, 1), workers=(0, 3))]


def test_a_spare_that_can_join_again_does() -> None:
    job = with_spare().feed(Unable(workers=frozenset({3}))).die(1).recover()
    _ = job.done
    job.feed(Unable(workers=frozenset())).wait(GATHERING_S)
    assert [type(action) for action in job.done] == [AskBoundary]


def test_a_job_that_stops_needs_no_spare() -> None:
    job = with_spare().feed(Stopping())
    assert lose(job, 1) == (0, 2)


# Deaths of spares


def test_a_spare_that_dies_is_replaced_at_once() -> None:
    job = with_spare().die(3)
    assert job.done == [Respawn(workers=(4,))]
    assert (job.state.failed_joins, job.phase) == (0, Phase.RUNNING)


def test_spares_that_die_again_and_again_are_replaced_only_after_a_while() -> None:
    job = with_spare()
    for number in range(3, 3 + DEATHS):
        job.wait(1.0).die(number).ready(number + 1)
    assert job.done == [Respawn(workers=(number,)) for number in range(4, 3 + DEATHS)]
    assert job.wait(FORGIVEN_S).done == [Respawn(workers=(3 + DEATHS,))]
    job.ready(3 + DEATHS)
    assert job.state.spares == {3 + DEATHS}


def test_spares_that_die_together_or_with_their_host_are_not_held_against_others() -> None:
    job = with_spare(spares=DEATHS)
    for number in range(3, 3 + DEATHS):
        job.die(number)
    assert job.done == [Respawn(workers=(number,)) for number in range(3 + DEATHS, 3 + 2 * DEATHS)]
    assert job.state.spares_from is None
    job = on_two_hosts().feed(Room(workers=3, spares=0, rooms={"a": 2})).die(5)
    assert job.state.spare_deaths == ()


def test_workers_are_replaced_although_spares_die() -> None:
    job = with_spare()
    for number in range(3, 3 + DEATHS):
        job.die(number).ready(number + 1)
    assert lose(job, 2) == (0, 1)
    assert Respawn(workers=(3 + DEATHS,)) in job.recover().done


def test_a_worker_that_was_replaced_and_then_is_able_to_join_is_ended() -> None:
    job = running(3, respawn=True, min_workers=3).feed(FirstCommit(worker=0, epoch=1, step=0))
    job.die(2).ready(3)
    job.recover().feed(FirstCommit(worker=0, epoch=2, step=1))
    job.state = replace(job.state, starting=frozenset({4}), next_worker=5)
    job.feed(JoinerReady(worker=4, member=Any), Unable(workers=frozenset({4}))).die(3)
    assert Respawn(workers=(5,)) in job.done, "nobody waits for a worker that is stopped"
    job.ready(5).feed(Unable(workers=frozenset()))
    job.recover()
    _ = job.done
    job.feed(FirstCommit(worker=0, epoch=job.state.view.epoch, step=2))
    assert job.done == [Evict(worker=4, why="others have joined in its place, and no spare is missing")]
    assert not job.state.ready
    job.die(4)
    assert not job.actions, "nobody misses it"


# Scaling and hosts


def test_scaling_up_takes_the_spare_at_the_next_boundary() -> None:
    job = with_spare().feed(Room(workers=4, spares=0)).feed(Timeout())
    assert job.done == [AskBoundary(workers=(0, 1, 2))]
    assert pause(job).done == [Quiesce(attempt_id=(2, 1), workers=(0, 1, 2, 3))]


def test_a_worker_is_replaced_by_a_spare_of_its_host() -> None:
    assert lose(on_two_hosts(), 1) == (0, 2, 3, 5)
    assert lose(on_two_hosts(), 0) == (1, 2, 3, 4)


def test_a_lost_host_is_replaced_by_the_spares_of_others() -> None:
    job = on_two_hosts().feed(Room(workers=3, spares=0, rooms={"a": 2}))
    assert lose(job, 5, 1, 3) == (0, 2, 4)
    job.recover()
    assert job.done[-1] == Announce(view=job.state.view, spares=(4,)), "there is no room for others"
    assert job.state.view.workers == (0, 2, 4)


def test_a_host_that_comes_back_gets_its_members_back() -> None:
    job = on_two_hosts().feed(Room(workers=3, spares=0, rooms={"a": 2}))
    lose(job, 5, 1, 3)
    on_hosts(job).wait(SETTLING_S)
    _ = job.done
    job.feed(Room(workers=4, spares=2, rooms={"a": 2, "b": 2}))
    assert job.done == [Respawn(workers=(6, 7, 8))]
    job.state = replace(job.state, next_worker=20)
    job.feed(*(JoinerReady(worker=worker, member=replace(member_of(worker), host="b")) for worker in (6, 7, 8))).feed(Timeout())
    assert job.state.leaving.keys() == {4}
    assert job.done == [AskBoundary(workers=(0, 2, 4))]
    pause(job)
    assert job.done == [Quiesce(attempt_id=(3, 1), workers=(0, 2, 4, 6, 7))], "worker 4 hands over what it owns"


def test_a_drained_host_is_replaced_by_the_spares_of_others() -> None:
    job = on_two_hosts().feed(Room(workers=3, spares=0, rooms={"a": 2})).die(5)
    job.feed(Draining(workers=frozenset({1, 3}), why="host b is drained"))
    _ = job.done
    assert pause(job).done == [Quiesce(attempt_id=(2, 1), workers=(0, 1, 2, 3, 4))]


def test_state_in_the_memory_of_a_host_without_members_is_fetched_by_its_spare() -> None:
    job = on_two_hosts()
    job.state = replace(job.state, unable=frozenset({5}))
    assert lose(job, 1, 3) == (0, 2, 4)
    job.feed(Unable(workers=frozenset())).inventories()
    _ = job.done
    job.feed(Unproposable(attempt_id=job.state.attempt_id, kind="CoverageLost", message="lost", elsewhere=True))
    (quiesce,) = [action for action in job.done if isinstance(action, Quiesce)] or ready(job, 6, 7).done
    assert 5 in quiesce.workers
