"""Tests that shrinking finds the faults that matter, with few runs, and a shorter job."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies

from elastic.chaos.injection import Injection
from elastic.chaos.schedule import JobSpec, Schedule
from elastic.chaos.shrink import shrunk

COUNT = 16


def schedule(**job: float) -> Schedule:
    faults = tuple(Injection(kind="kill", step=10 * (place + 1)) for place in range(COUNT))
    return Schedule(job=JobSpec.from_json({"steps": 1000, **job}), injections=faults)


@hypothesis.given(strategies.sets(strategies.integers(0, COUNT - 1), min_size=1, max_size=4))
def test_exactly_the_faults_that_matter_are_left(needed: set[int]):
    whole, runs = schedule(), list[Schedule]()
    matter = {whole.injections[place] for place in needed}

    def fails(candidate: Schedule) -> bool:
        runs.append(candidate)
        return matter <= set(candidate.injections)

    smallest = shrunk(whole, fails)
    assert set(smallest.injections) == matter
    assert smallest.job.steps == max(each.step or 0 for each in matter) + 60
    assert len(runs) == len({(each.injections, each.job) for each in runs}), "no schedule is run twice"
    assert len(runs) < COUNT * COUNT


def test_a_job_that_fails_without_faults_has_none_left():
    assert shrunk(schedule(), lambda _: True).injections == ()


def test_a_shorter_job_that_does_not_fail_is_not_taken():
    whole = schedule()
    smallest = shrunk(whole, lambda candidate: candidate.job.steps == 1000 and whole.injections[3] in candidate.injections)
    assert smallest.injections == (whole.injections[3],)
    assert smallest.job.steps == 1000
