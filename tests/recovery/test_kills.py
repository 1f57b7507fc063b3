"""Tests forked workers that die at any point, also during recovery: the rest continues bit for bit, or reports what is lost."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from elastic.errors import CoverageLost
from elastic.observe.activity import PHASES
from elastic.worker.job import Job
from tests.recovery import forks
from tests.recovery.forks import Agent, die, when

pytestmark = pytest.mark.slow

IN_STEPS = ("forward", "backward", "reduce", "ready", "apply", "gather", "replicate")


@cache
def calm() -> dict[str, Any]:
    return forks.run(1).results[0]


def check(agent: Agent) -> None:
    assert agent.view is not None
    assert all(result["reports"] == calm()["reports"] for result in agent.results.values())
    assert agent.results[agent.view.coordinator]["digest"] == calm()["digest"]


def dies_in(job: Job, phase: str, step: int, epoch: int, times: int) -> None:
    """At the `times`-th time that it is there; in a phase of a recovery at the first one, whatever the step."""
    enter, left = job.enter, [times]

    def entered(entering: str, at: int, micro_batch: int = -1) -> None:
        enter(entering, at, micro_batch)
        if (entering, job.epoch) == (phase, epoch) and (phase not in IN_STEPS or at == step):
            left[0] -= 1
            if left[0] <= 0 or phase not in IN_STEPS:
                die()

    job.enter = entered  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("seed", range(10))
def test_whoever_dies_wherever(seed: int) -> None:
    chance = random.Random(seed)
    workers = chance.randint(3, 5)
    first, *others = chance.sample(range(workers), chance.randint(1, 3))
    fates = {first: (chance.choice(IN_STEPS), chance.randrange(5), 1, 1)}
    for worker in others:
        fates[worker] = (chance.choice(PHASES[1:]), chance.randrange(2, 6), chance.choice([1, 2, 2, 3]), chance.randint(1, 2))

    def prepare(job: Job) -> None:
        if job.worker in fates:
            dies_in(job, *fates[job.worker])

    agent = Agent(workers, chance.randint(1, min(workers, 4)), prepare)
    try:
        agent.run()
    except CoverageLost:
        assert agent.view is not None
        assert len(set(agent.view.workers) - set(agent.live)) > 1, f"one died, and there are two copies of everything: {fates}"
    else:
        assert first not in agent.live
        check(agent)


def test_a_death_right_behind_a_commit_reaches_whoever_has_not_heard_of_the_commit_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 4 has no link to worker 2, whose death it can hear of by the order to quiesce only."""
    monkeypatch.setattr(forks, "LAYERS", 8)
    monkeypatch.setattr(forks, "TIMEOUT_S", 4)
    take = Job.take_order

    def slow(job: Job) -> dict[str, Any]:
        """Waits until the worker finds both the view and the order after it."""
        with job._ordered:
            job._ordered.wait_for(
                lambda: job._orders and (job._orders[0].get("view", {}).get("epoch") != 2 or len(job._orders) > 1), forks.TIMEOUT_S
            )
        return take(job)

    def prepare(job: Job) -> None:
        Job.take_order = slow
        if job.worker == 1:
            when(job, "forward", 2, die)

    agent = forks.run(5, 5, prepare=prepare, committed=lambda agent: agent.kill(2))
    assert agent.live == [0, 3, 4]
