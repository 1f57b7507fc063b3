"""Tests when an extremely slow worker is excluded: only if the job is predicted to be faster without it, and not again and again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.health.crawling import AGAIN_S, EXTREME, Crawling
from elastic.health.verdict import CRAWLING
from elastic.plan.planner import step_s
from elastic.view import View
from tests.recovery.recovering import view_of

PIPELINE = view_of([0, 1, 2], stages=3)
PARALLEL = view_of([0, 1, 2], stages=1)


def slow(view: View, factor: float, worker: int = 1) -> dict[int, float]:
    return {each: factor if each == worker else 1.0 for each in view.workers}


def known(view: View, factor: float) -> View:
    """The view after its work was shifted away from worker 1, as far as it matters here."""
    members = tuple(replace(member, slowdown=factor if member.worker == 1 else 1.0) for member in view.members)
    return replace(view, members=members, epoch=view.epoch + 1)


def paced(crawling: Crawling, view: View, seconds: float) -> Crawling:
    for step in range(9):
        crawling.note(view, view.epoch, 40 + step, seconds)
    return crawling


def test_one_with_a_stage_of_its_own_is_excluded() -> None:
    found = Crawling(3, 1).verdict(PIPELINE, slow(PIPELINE, 30.0), 0.0)
    assert found is not None
    assert (found.worker, found.kind, found.excludes) == (1, CRAWLING, True)
    assert found.why.startswith("it takes 30 times as long as others; steps take ")


def test_one_that_can_be_left_without_work_is_not() -> None:
    assert Crawling(1, 1).verdict(PARALLEL, slow(PARALLEL, 30.0), 0.0) is None


@pytest.mark.parametrize("factor", [1.0, EXTREME - 0.1])
def test_one_that_is_not_extremely_slow_is_not(factor: float) -> None:
    assert Crawling(3, 1).verdict(PIPELINE, slow(PIPELINE, factor), 0.0) is None


def test_a_job_that_may_not_shrink_keeps_it() -> None:
    assert Crawling(3, 3).verdict(PIPELINE, slow(PIPELINE, 30.0), 0.0) is None
    assert Crawling(1, 1).verdict(view_of([0], stages=1), None, 0.0) is None


@pytest.mark.parametrize(("times", "excluded"), [(1.9, False), (2.1, True)])
def test_one_that_slows_the_others_without_any_work_is_excluded(times: float, excluded: bool) -> None:
    """Of four grains a worker has two, be they two workers or three. Predictions are scaled by how long steps took before."""
    usual = 3.0 * step_s(PARALLEL.plan, PARALLEL.workload, PARALLEL.fleet)
    view = known(PARALLEL, 30.0)
    crawling = paced(paced(Crawling(1, 1), PARALLEL, usual), view, times * usual)
    assert (crawling.verdict(view, None, 5.0) is not None) == excluded


def test_a_pace_counts_only_after_some_steps() -> None:
    view, crawling = known(PARALLEL, 30.0), paced(Crawling(1, 1), PARALLEL, 1.0)
    crawling.note(view, view.epoch, 50, 99.0)
    assert crawling.verdict(view, None, 0.0) is None


def test_no_other_is_excluded_on_that_host_for_an_hour_and_then_for_two() -> None:
    crawling, now = Crawling(3, 1), 0.0
    for hours in (1, 2, 4):
        assert crawling.verdict(PIPELINE, slow(PIPELINE, 30.0), now) is not None
        assert crawling.verdict(PIPELINE, slow(PIPELINE, 30.0, worker=2), now + hours * AGAIN_S - 1.0) is None
        now += hours * AGAIN_S
