"""Tests timings: the source of the seconds, their scaling, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_strategies import cost
from schedule_strategies import updating

from elastic.errors import PlanError
from elastic.plan.plan import Stage
from elastic.plan.timing import MemberSeconds, Timing
from elastic.plan.workload import Workload

WORKLOAD = Workload(layers=(cost(1, 2, 10), cost(1, 4), cost(2, 2, 10)), micro_batches=4, grains=4)
STAGES = (Stage(layers=range(2), members=(5, 6)), Stage(layers=range(2, 3), members=(7,)))
BASE = Timing.of(WORKLOAD, STAGES)


def test_seconds_are_those_of_the_layers():
    assert BASE.paces == {5: MemberSeconds(forward_s=2, backward_s=6), 6: BASE.paces[5], 7: MemberSeconds(forward_s=2, backward_s=2)}
    assert BASE.stage == {5: 0, 6: 0, 7: 1}
    assert BASE.links is None


def test_slow_workers():
    timing = updating(BASE, {6: 1.0}).slowed({6: 3.0})
    assert timing.paces[5] == BASE.paces[5]
    assert timing.paces[6] == MemberSeconds(forward_s=6, backward_s=18, update_s=3)


def test_links_between_stages():
    timing = BASE.linked([0.25], [0.5])
    assert timing.links is not None
    assert (timing.links(5, 7), timing.links(7, 6)) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MemberSeconds(forward_s=-1.0, backward_s=0.0), "forward_s of a worker takes -1.0 s"),
        (lambda: MemberSeconds(forward_s=0.0, backward_s=float("nan")), "backward_s of a worker takes nan s"),
        (lambda: replace(BASE, sync_s=(1.0,)), "2 stages have seconds of synchronisation for 1"),
        (lambda: replace(BASE, sync_s=(1.0, float("inf"))), "synchronisation of a stage takes inf s"),
        (lambda: replace(BASE, paces={5: BASE.paces[5]}), r"workers \[6, 7\] have no pace"),
        (lambda: BASE.linked([1.0, 1.0], [1.0, 1.0]), "2 stages have 1 boundaries, not 2 and 2"),
        (lambda: BASE.linked([1.0], [-1.0]), "a message over a boundary takes -1.0 s"),
        (lambda: BASE.slowed({5: -1.0}), "takes -2.0 s"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()
