"""Tests when slower workers cause a change of the plan, and when they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.control.balance import APART, MOST_REPORTS, REPORTS, Reports, sentence, wanted
from elastic.recovery.gate import check_proposal
from elastic.recovery.proposal import propose
from elastic.view import View
from tests.recovery.recovering import inventories_of, view_of

VIEW = view_of([0, 1, 2], stages=1)
ALONE = view_of([0, 1], stages=2)


def reported(*slowdowns: list[float], view: View = VIEW, waits: Sequence[float] = (), slow: Sequence[float] = ()) -> Reports:
    """Returns reports of all workers; the last entry repeats. `waits`: wall-clock over CPU time. `slow`: the speed reference's slowdown."""
    reports = Reports()
    tell(reports, slowdowns, view, waits, slow)
    return reports


def tell(
    reports: Reports,
    slowdowns: Sequence[Sequence[float]],
    view: View,
    waits: Sequence[float] = (),
    slow: Sequence[float] = (),
    turns: int = REPORTS,
) -> None:
    computed, cpu = [0.0] * len(slowdowns), [0.0] * len(slowdowns)
    for turn in range(turns):
        for place, each in enumerate(slowdowns):
            spent = 0.1 * each[min(turn, len(each) - 1)]
            computed[place] += spent
            cpu[place] += spent / (waits[place] if waits else 1.0)
            reference = 1e-5 * (slow[place] if slow else 1.0)
            reports.note(view.epoch, view.workers[place], computed[place], cpu[place], 0.1 * (turn + 1), reference)


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
    assert reported([2.0], [9.0], view=ALONE).relative(ALONE) == {0: 1.0, 1: 1.0}


def test_nothing_is_said_before_all_have_told_enough_in_this_view():
    reports = reported([1.0], [1.0])
    assert reports.relative(VIEW) is None
    reports.note(VIEW.epoch + 1, 2, 1.0, 1.0, 1.0, 1.0)
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


def changed(view: View, slowdowns: dict[int, float], stages: int | None) -> View:
    """Returns the view after a change of the plan."""
    found = propose(last=view, attempt=1, inventories=inventories_of(view, view.workers), joiners={}, stages=stages, slowdowns=slowdowns)
    check_proposal(found, view)
    return found.view


def test_one_that_is_alone_and_waits_for_its_processor_gives_layers_away_and_gets_them_back():
    slow = reported([1.0], [3.0], view=ALONE, waits=[1.0, 3.0]).relative(ALONE)
    assert slow == {0: 1.0, 1: 3.0}
    assert wanted(ALONE, slow, 2)
    view = changed(ALONE, slow, 2)
    layers = {worker: len(view.layout.layers_of(worker)) for worker in view.workers}
    assert layers == {0: 3, 1: 1}
    assert reported([1.0], [3.0], view=view, waits=[1.0, 3.0]).relative(view) == slow, "it is as slow as it is known to be"
    well = reported([1.0], [1.0], view=view, waits=[1.0, 1.1]).relative(view)
    assert well == {0: 1.0, 1: 1.0}
    assert wanted(view, well, 2)
    assert changed(view, well, 2).plan.summary == ALONE.plan.summary


def test_one_that_is_alone_with_a_slower_processor_is_found_by_the_speed_reference():
    assert reported([1.0], [2.5], view=ALONE, slow=[1.0, 2.5]).relative(ALONE) == {0: 1.0, 1: 2.5}
    assert reported([2.0], [1.0], view=ALONE, slow=[2.0, 1.0]).relative(ALONE) == {0: 2.0, 1: 1.0}


@given(st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4), st.floats(0.5, 4.0), st.data())
def test_neither_layers_nor_what_all_wait_for_nor_noise_make_one_that_is_alone_slow(layers, common, data):
    view = view_of([4, 2, 7, 5], stages=4)
    noise = st.floats(1.0, APART * 0.99)
    waits, slow = [common * data.draw(noise) for _ in layers], [1.0] * 4
    assert reported(*([each] for each in layers), view=view, waits=waits, slow=slow).relative(view) == dict.fromkeys(view.workers, 1.0)


@given(st.integers(0, 3), st.floats(APART * 1.01, 8.0), st.floats(1.0, 4.0), st.lists(st.floats(0.2, 5.0), min_size=4, max_size=4))
def test_one_that_is_alone_is_found_whatever_its_layers(place, factor, common, layers):
    view = view_of([4, 2, 7, 5], stages=4)
    waits = [common * (factor if place == each else 1.0) for each in range(4)]
    found = reported(*([each] for each in layers), view=view, waits=waits).relative(view)
    assert found == pytest.approx({worker: factor if place == at else 1.0 for at, worker in enumerate(view.workers)}, abs=0.01)


def test_after_each_change_one_that_is_alone_needs_twice_the_reports():
    reports = Reports()
    for epoch in range(4, 10):
        view = replace(ALONE, epoch=epoch)
        assert reports.patience == min(MOST_REPORTS, REPORTS << (epoch - 4))
        tell(reports, [[1.0], [3.0]], view, waits=[1.0, 3.0], turns=reports.patience - 1)
        assert reports.relative(view) == (None if epoch == 4 else {0: 1.0, 1: 1.0})
        one_more(reports, view)
        assert reports.relative(view) == {0: 1.0, 1: 3.0}
        reports.acted()
    assert reports.patience == MOST_REPORTS


def one_more(reports: Reports, view: View) -> None:
    """Report of each, the last that was lacking."""
    for worker, factor in zip(view.workers, (1.0, 3.0), strict=True):
        count = reports.patience
        reports.note(view.epoch, worker, 0.1 * factor * count, 0.1 * count, 0.1 * count, 1e-5)


def test_in_a_stage_of_several_the_finer_measure_counts_alone():
    assert reported([2.0], [2.0], [2.0], waits=[1.0, 1.0, 3.0]).relative(VIEW) == dict.fromkeys(range(3), 1.0)


def test_sentences():
    assert sentence({0: 1.0, 1: 3.04}) == "worker 1 takes 3 times as long as others"
    assert sentence({0: 1.0}) == "all workers are equally fast again"
