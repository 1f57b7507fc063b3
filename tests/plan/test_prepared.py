"""Tests that prepared plans equal those of a new search."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plan_strategies import cost, fleet, workloads

from elastic.errors import PlanError
from elastic.plan.fleet import Fleet
from elastic.plan.planner import fastest, plan
from elastic.plan.prepared import Prepared
from elastic.plan.search import Question, asking, nameless, preparing, searching
from elastic.plan.slicing import finish as done
from elastic.plan.workload import Workload


def without(whole: Fleet, lost: int) -> Fleet:
    return replace(whole, workers=tuple(worker for worker in whole.workers if worker != lost))


def finish(prepared: Prepared) -> int:
    """Runs it to the end; returns the number of slices."""
    count = 1
    while prepared.advance():
        count += 1
    return count


fleets = st.lists(st.integers(0, 99), min_size=2, max_size=5, unique=True).flatmap(
    lambda workers: st.builds(
        fleet,
        st.just(workers),
        st.dictionaries(st.sampled_from(workers), st.sampled_from([1.0, 2.0])),
        hosts=st.fixed_dictionaries({worker: st.sampled_from("ab") for worker in workers}),
    )
)


@settings(max_examples=30, deadline=None)
@given(workloads(most_layers=4), fleets, st.sampled_from([None, 1, 2]), st.floats(0.1, 100), st.booleans())
def test_a_prepared_plan_is_the_one_that_would_be_found(workload, whole, stages, horizon, brief):
    assume(stages is None or stages <= len(workload.layers))
    before = fastest(whole, workload, 1)
    prepared = preparing([without(whole, lost) for lost in whole.workers], workload, stages)
    finish(prepared)
    for lost in whole.workers:
        left = without(whole, lost)
        question = asking(left, workload, stages)
        assert prepared.answer(question) == done(searching(question))
        fresh = plan(left, workload, before, horizon, stages=stages, brief=brief)
        assert plan(left, workload, before, horizon, stages=stages, brief=brief, prepared=prepared) == fresh


def equal_layers() -> Workload:
    return Workload(layers=(cost(0.01, 0.02, 1000),) * 6, micro_batches=8, grains=8)


def test_losses_that_leave_the_same_are_searched_for_once():
    whole = fleet([4, 2, 9, 7])
    prepared = preparing([without(whole, lost) for lost in whole.workers], equal_layers(), None)
    finish(prepared)
    assert prepared.classes == 1
    slow = replace(whole, slowdowns={9: 2.0})
    prepared = preparing([without(slow, lost) for lost in slow.workers], equal_layers(), None)
    finish(prepared)
    assert prepared.classes == 3, "before it, it, behind it"


def test_it_can_be_left_off_and_knows_nothing_then():
    whole = fleet(range(4))
    prepared = preparing([without(whole, lost) for lost in whole.workers], equal_layers(), None)
    assert prepared.advance()
    shape = nameless(without(whole, 0))
    assert prepared.answer(Question(shape, equal_layers(), None)) is None
    assert finish(prepared) > 1
    assert prepared.answer(Question(shape, equal_layers(), None)) is not None


def test_for_another_question_nothing_is_known():
    whole = fleet(range(4))
    prepared = preparing([without(whole, 0)], equal_layers(), None)
    finish(prepared)
    shape = nameless(without(whole, 0))
    assert prepared.answer(Question(shape, equal_layers(), 2)) is None
    assert prepared.answer(Question(nameless(whole), equal_layers(), None)) is None
    assert prepared.answer(Question(replace(shape, slowdowns={**shape.slowdowns, 0: 2.0}), equal_layers(), None)) is None
    assert prepared.answer(Question(shape, replace(equal_layers(), grains=4), None)) is None


def test_a_loss_with_which_nothing_is_possible_is_said_when_it_comes():
    tight = fleet(range(3), memory=dict.fromkeys(range(3), 10))
    prepared = preparing([without(tight, 0)], equal_layers(), None)
    finish(prepared)
    with pytest.raises(PlanError, match="does not fit into memory"):
        plan(without(tight, 0), equal_layers(), fastest(fleet(range(3)), equal_layers(), 1), prepared=prepared)
