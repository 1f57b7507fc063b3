"""Tests who is found to keep others waiting nearly always, and when it is excluded for that."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from elastic.health.crawling import AGAIN_S, Crawling
from elastic.health.delaying import LOOKS, Delays
from elastic.health.evidence import Observed
from elastic.health.verdict import CRAWLING
from elastic.observe.activity import LOADER, TRAIN_FN
from elastic.plan.planner import step_s
from tests.health.observing import Condition
from tests.health.test_crawling import PARALLEL, paced

USUAL_S = 3.0 * step_s(PARALLEL.plan, PARALLEL.workload, PARALLEL.fleet)


def seen(*conditions: Condition) -> list[Observed]:
    return [condition.observed(worker, 1.0) for worker, condition in enumerate(conditions)]


WAITS_FOR_1 = Condition(waits_for=1)
LATE = seen(Condition(waits_for=2), Condition(state="T"), WAITS_FOR_1)
"""Worker 0 waits for 2, which waits for 1."""

NOBODY_LATE = seen(Condition(), Condition(), WAITS_FOR_1)


def looked(*looks: Sequence[Observed], epoch: int = 1) -> Delays:
    delays = Delays()
    for look in looks:
        delays.note(epoch, range(len(look)), look)
    return delays


def test_one_that_the_others_wait_for_nearly_always_is_found() -> None:
    assert looked(*[LATE] * LOOKS).worst(1) == (1, 1.0)
    assert looked(*[LATE] * (LOOKS - 8), *[seen(Condition(), Condition(), Condition())] * 8).worst(1) == (1, 0.8)
    assert looked(*[LATE] * (LOOKS - 9), *[seen(Condition(), Condition(), Condition())] * 9).worst(1) is None
    assert looked(*[LATE] * (LOOKS - 1)).worst(1) is None
    assert looked(*[LATE] * LOOKS).worst(2) is None


def test_one_that_could_run_does_not_wait_whatever_it_has_recorded() -> None:
    assert looked(*[seen(WAITS_FOR_1, Condition(waits_for=0, state="R"))] * LOOKS).worst(1) == (1, 1.0)
    assert looked(*[seen(WAITS_FOR_1, Condition(waits_for=0))] * LOOKS).worst(1) is None


def test_nobody_is_found_where_few_wait_or_the_users_own_code_takes_long() -> None:
    four = seen(Condition(), Condition(), WAITS_FOR_1, Condition(), Condition())
    assert looked(*[four] * LOOKS).worst(1) is None
    for place in (TRAIN_FN, LOADER):
        assert looked(*[seen(WAITS_FOR_1, Condition(place=place))] * LOOKS).worst(1) is None


@pytest.mark.parametrize(("times", "excluded"), [(4.9, False), (5.1, True)])
def test_it_is_excluded_only_if_steps_take_extremely_long(times: float, excluded: bool) -> None:
    crawling = paced(paced(Crawling(1, 1), PARALLEL, USUAL_S), PARALLEL, times * USUAL_S)
    found = crawling.delaying(PARALLEL, (1, 0.9), 5.0)
    assert (found is not None) == excluded
    if found is not None:
        assert (found.worker, found.kind, found.excludes) == (1, CRAWLING, True)
        assert found.why.startswith("others waited for it in 90% of the last looks; steps take ")


def test_it_is_not_excluded_again_soon_nor_below_the_least_number_nor_without_a_pace() -> None:
    slow = 9.0 * USUAL_S
    crawling = paced(paced(Crawling(1, 1), PARALLEL, USUAL_S), PARALLEL, slow)
    assert crawling.delaying(PARALLEL, None, 0.0) is None
    assert crawling.delaying(PARALLEL, (1, 0.9), 5.0) is not None
    assert crawling.delaying(PARALLEL, (1, 0.9), 7.0) is None
    assert crawling.delaying(PARALLEL, (1, 0.9), 5.0 + AGAIN_S) is not None
    assert paced(paced(Crawling(1, 3), PARALLEL, USUAL_S), PARALLEL, slow).delaying(PARALLEL, (1, 0.9), 5.0) is None
    assert Crawling(1, 1).delaying(PARALLEL, (1, 0.9), 5.0) is None
