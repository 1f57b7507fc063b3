"""Tests who is found to be stopped in turns, and when it is excluded for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from elastic.health.crawling import AGAIN_S, Crawling
from elastic.health.evidence import Observed
from elastic.health.turns import LOOKS, Halts, Turns
from elastic.health.verdict import CRAWLING
from elastic.plan.planner import fastest, step_s
from tests.health.observing import Condition
from tests.health.test_crawling import PARALLEL, paced

SCALE = 3.0
USUAL_S = SCALE * step_s(PARALLEL.plan, PARALLEL.workload, PARALLEL.fleet)
ALONE_S = SCALE * fastest(PARALLEL.fleet.ordered([0, 2]), PARALLEL.workload, 1).step_s


def seen(states: str) -> list[Observed]:
    return [Condition(state=state).observed(worker, 1.0) for worker, state in enumerate(states)]


def looked(*looks: Sequence[Observed]) -> Turns:
    turns = Turns()
    for look in looks:
        turns.note(1, range(3), look)
    return turns


def test_one_that_is_stopped_in_half_of_the_looks_is_found() -> None:
    most = LOOKS // 2 + 1
    assert looked(*[seen("STS")] * LOOKS).worst(1) == Halts(worker=1, share=1.0)
    assert looked(*[seen("RSS"), seen("STS")] * LOOKS).worst(1) == Halts(worker=1, share=most / LOOKS)
    assert looked(*[seen("STS"), seen("SSS"), seen("SSS")] * LOOKS).worst(1) is None
    assert looked(*[seen("STS")] * (LOOKS - 1)).worst(1) is None
    assert looked(*[seen("STS")] * LOOKS).worst(2) is None


def held(*shares: float) -> list[Observed]:
    return [replace(each, held=share) for each, share in zip(seen("RRR"), shares, strict=True)]


def test_one_whose_quota_keeps_it_from_running_is_found() -> None:
    assert looked(*[held(0.0, 0.875, 0.125)] * LOOKS).worst(1) == Halts(worker=1, share=0.875, by_quota=True)
    assert looked(*[held(0.0, 0.4, 0.1)] * LOOKS).worst(1) is None
    assert looked(*[held(0.0, 0.9, 0.0), held(0.0, 0.0, 0.0)] * LOOKS, held(0.0, 0.9, 0.0)).worst(1) is None, "0.468 of the time"
    assert looked(*[held(0.8, 0.9, 0.7)] * LOOKS).worst(1) is None, "all have the same quota"
    stopped_too = [[replace(each, held=0.6) for each in seen("RTR")], held(0.0, 0.6, 0.0)]
    found = looked(*stopped_too * LOOKS).worst(1)
    assert found is not None
    assert (found.worker, found.by_quota) == (1, False)


def test_a_pause_of_all_is_nobodys() -> None:
    assert looked(*[seen("TTT")] * LOOKS).worst(1) is None


def test_another_view_begins_anew() -> None:
    turns = looked(*[seen("STS")] * LOOKS)
    turns.note(2, range(3), seen("STS"))
    assert turns.worst(2) is None


@pytest.mark.parametrize(("times", "excluded"), [(1.9, False), (2.1, True)])
def test_it_is_excluded_if_steps_are_predicted_to_be_twice_as_fast_without_it(times: float, excluded: bool) -> None:
    crawling = paced(paced(Crawling(1, 1), PARALLEL, USUAL_S), PARALLEL, times * ALONE_S)
    found = crawling.stopped_in_turns(PARALLEL, Halts(worker=1, share=0.9), 5.0)
    assert (found is not None) == excluded
    if found is not None:
        assert (found.worker, found.kind, found.excludes) == (1, CRAWLING, True)
        assert found.why.startswith("it is stopped in turns, in 90% of the last looks; steps take ")


def test_it_is_not_excluded_again_soon_nor_below_the_least_number_nor_without_a_pace() -> None:
    slow = 9.0 * ALONE_S
    crawling = paced(paced(Crawling(1, 1), PARALLEL, USUAL_S), PARALLEL, slow)
    assert crawling.stopped_in_turns(PARALLEL, None, 0.0) is None
    assert crawling.stopped_in_turns(PARALLEL, Halts(worker=1, share=0.9), 5.0) is not None
    assert crawling.stopped_in_turns(PARALLEL, Halts(worker=1, share=0.9), 7.0) is None
    assert crawling.stopped_in_turns(PARALLEL, Halts(worker=1, share=0.9), 5.0 + AGAIN_S) is not None
    assert (
        paced(paced(Crawling(1, 3), PARALLEL, USUAL_S), PARALLEL, slow).stopped_in_turns(PARALLEL, Halts(worker=1, share=0.9), 5.0) is None
    )
    assert Crawling(1, 1).stopped_in_turns(PARALLEL, Halts(worker=1, share=0.9), 5.0) is None
