"""When the plan is changed for workers that are slower, and when not."""

from __future__ import annotations

from dataclasses import replace

from elastic.recovery.balance import REPORTS, Reports, sentence, wanted
from elastic.recovery.gate import check_proposal
from elastic.recovery.proposal import propose
from elastic.view import View
from tests.recovery.recovering import inventories_of, view_of

VIEW = view_of([0, 1, 2], stages=1)


def reported(*slowdowns: list[float], view: View = VIEW) -> Reports:
    """Of each worker; the last one again and again."""
    reports = Reports()
    computed = [0.0] * len(slowdowns)
    for turn in range(REPORTS):
        for worker, each in enumerate(slowdowns):
            computed[worker] += 0.1 * each[min(turn, len(each) - 1)]
            reports.note(view.epoch, worker, computed[worker], 0.1 * (turn + 1))
    return reports


def test_a_worker_that_is_steadily_slower_is_told_from_noise():
    assert reported([2.0], [2.1], [6.0, 6.4]).relative(VIEW) == {0: 1.0, 1: 1.0, 2: 3.05}


def test_one_report_among_the_others_is_enough_doubt():
    assert reported([2.0], [2.1], [6.0, 2.0, 6.0]).relative(VIEW) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_what_all_have_in_common_does_not_count():
    assert reported([9.0], [9.3], [9.1]).relative(VIEW) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_of_two_the_faster_one_is_the_measure():
    view = view_of([0, 1], stages=1)
    assert reported([6.0], [2.0], view=view).relative(view) == {0: 3.0, 1: 1.0}


def test_layers_that_the_workload_does_not_know_well_are_nobodys_fault():
    view = view_of([0, 1, 2, 3], stages=2)
    assert reported([2.0], [2.1], [9.0], [9.3], view=view).relative(view) == dict.fromkeys(range(4), 1.0)
    assert reported([2.0], [2.1], [9.0], [27.9], view=view).relative(view) == {0: 1.0, 1: 1.0, 2: 1.0, 3: 3.1}
    alone = view_of([0, 1], stages=2)
    assert reported([2.0], [9.0], view=alone).relative(alone) == {0: 1.0, 1: 1.0}


def test_nothing_is_said_before_all_have_told_enough_in_this_view():
    reports = reported([1.0], [1.0])
    assert reports.relative(VIEW) is None
    reports.note(VIEW.epoch + 1, 2, 1.0, 1.0)
    assert reports.relative(VIEW) is None
    assert reported([1.0], [1.0], [1.0]).relative(replace(VIEW, epoch=VIEW.epoch + 1)) is None


def test_another_plan_is_wanted_once_and_again_when_the_cause_is_gone():
    view, slow = view_of([0, 1], stages=1), {0: 1.0, 1: 3.0}
    assert wanted(view, slow, 1)
    assert not wanted(view, {0: 1.0, 1: 1.1}, 1)
    found = propose(last=view, attempt=1, inventories=inventories_of(view, view.workers), joiners={}, stages=1, slowdowns=slow)
    check_proposal(found, view)
    assert found.view.slowdowns == slow
    assert found.transfers == (), "only routes have changed"
    assert View.from_json(found.view.to_json()) == found.view
    assert not wanted(found.view, slow, 1)
    assert reported([2.0], [6.4], view=found.view).relative(found.view) == slow, "it is as slow as it is known to be"
    assert reported([2.0], [2.1], view=found.view).relative(found.view) == {0: 1.0, 1: 1.0}
    assert wanted(found.view, {0: 1.0, 1: 1.0}, 1)


def test_sentences():
    assert sentence({0: 1.0, 1: 3.04}) == "worker 1 takes 3 times as long as others"
    assert sentence({0: 1.0}) == "all workers are equally fast again"
