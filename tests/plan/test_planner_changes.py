"""Tests that a change of plan must pay: the cost of the migration, the horizon, and the messages about both."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_strategies import cost, few, fleet, workloads

from elastic.errors import PlanError
from elastic.plan.moving import Moving, moving
from elastic.plan.plan import Plan
from elastic.plan.planner import fastest, plan, staying
from elastic.plan.site import LinkSpeed, Site
from elastic.plan.workload import Workload

SLOW = Site(links={("host", "host"): LinkSpeed(latency_s=0.0, bytes_per_s=1e6)})


def equal_layers(layers: int = 8, parameters: int = 1000) -> Workload:
    return Workload(layers=(cost(0.01, 0.02, parameters),) * layers, micro_batches=8, grains=8, state_bytes=8.0)


def test_a_first_plan_is_the_fastest():
    found = plan(fleet(range(4)), equal_layers(), stages=2)
    assert found.plan == fastest(fleet(range(4)), equal_layers(), 2)
    assert found.moving == Moving(bytes=0.0, seconds=0.0)
    assert "stage 0 (layers 0 to 3) computes longest" in found.plan.why
    assert "links without a measurement are assumed to carry 2 GB/s" in found.plan.why
    assert "nobody" not in plan(fleet(range(4), site=SLOW), equal_layers(), stages=2).plan.why


def test_over_a_short_horizon_layers_stay_and_over_a_long_one_they_move():
    workload = equal_layers(parameters=40_000)
    before = fastest(fleet(range(4)), workload, 2)
    left = fleet([0, 1, 2], site=SLOW)
    brief, long = (plan(left, workload, before, horizon) for horizon in (0.1, 1000))
    assert [stage.layers for stage in brief.plan.stages] == [stage.layers for stage in before.stages]
    assert "no other plan is faster over 0.1 steps" in brief.plan.why
    assert long.plan.step_s < brief.plan.step_s
    assert f"with all layers in place a step would take {brief.plan.step_s:.3g} s, compared over 1000 steps" in long.plan.why
    assert long.moving.seconds > brief.moving.seconds
    assert long.moving.seconds == pytest.approx(moving(before, long.plan.stages, workload, left).seconds)


def test_the_sentence_says_what_was_asked_for_and_why_there_is_less_of_it():
    """After losses a job that asks for stages gets fewer: that is not what it asked for."""
    workload = equal_layers()
    before = fastest(fleet(range(4)), workload, 3)
    assert plan(fleet(range(3)), workload, before, stages=3).plan.why.startswith("3 stages, as asked: ")
    two = plan(fleet([0, 3]), workload, before, stages=3)
    assert two.plan.why.startswith("2 stages, not the 3 that were asked for, since there are only 2 workers: ")
    one = plan(fleet([3]), workload, before, stages=3)
    assert one.plan.why.startswith("1 stage, not the 3 that were asked for, since there is only 1 worker: ")
    assert plan(fleet([3]), workload, stages=3).plan.why.startswith("1 stage, not the 3 that were asked for")
    assert plan(fleet([3]), workload, stages=1).plan.why.startswith("1 stage, as asked: ")


def test_the_sentence_counts_as_people_do():
    assert plan(fleet([3]), equal_layers()).plan.why.startswith("1 stage, the only number possible: ")
    assert plan(fleet([3, 4]), equal_layers()).plan.why.startswith("1 stage, fastest of 1 to 2: ")
    alone = plan(fleet([1, 2]), equal_layers(layers=2), stages=2).plan.why
    assert "stage 0 (layer 0) computes longest" in alone
    unused = fastest(fleet(range(3)), Workload(layers=(cost(0.01, 0.02, 10),), micro_batches=2, grains=2)).why
    assert "worker 2 gets no grain: there are only 2" in unused
    before = fastest(fleet(range(4)), equal_layers(), 2)
    assert plan(fleet(range(3), site=SLOW), equal_layers(), before, 1.0, stages=2).plan.why.endswith(" over 1 step")


def test_a_step_that_was_interrupted_is_kept_by_those_who_stay():
    before = fastest(fleet(range(4)), equal_layers(), 2)
    left = fleet([0, 1, 2])
    calm, brief = (plan(left, equal_layers(), before, 0.5, brief=each) for each in (False, True))
    assert calm.plan.step_s < brief.plan.step_s


def test_what_is_not_trained_moves_with_its_layer():
    """A worker that gets layers is sent their frozen bytes once; they have no states, so nothing moves inside a stage for them."""
    workload = equal_layers()
    heavy = replace(workload, layers=tuple(replace(layer, frozen_bytes=5000) for layer in workload.layers))
    one, two = fastest(fleet(range(2)), workload, 1), fastest(fleet(range(2)), workload, 2)
    for before, after, gained in ((two, one, 8), (two, two, 0), (one, two, 0)):
        sizes = [moving(before, after.stages, each, fleet(range(2))).bytes for each in (workload, heavy)]
        lacked = 0.0 if fleet(range(2)).replicas else 1.0
        assert sizes[1] - sizes[0] == pytest.approx(gained * 5000 * lacked)


def test_nobody_left_in_a_stage_means_that_layers_move():
    before = fastest(fleet(range(2)), equal_layers(), 2)
    found = plan(fleet([1]), equal_layers(), before, 1.0)
    assert found.plan.summary == "[0-7]x1"
    assert "the layers cannot stay in place" in found.plan.why


def test_whoever_comes_goes_where_most_is_to_do():
    before = fastest(fleet(range(4)), equal_layers(), 2)
    shrunk = staying(before, fleet([0, 1, 2]), equal_layers())
    assert shrunk is not None
    again = plan(fleet([0, 1, 2, 9]), equal_layers(), shrunk, stages=2)
    assert again.plan.summary == before.summary
    assert again.plan.stages[1].members == (2, 9)


def test_the_job_has_the_stages_that_it_asked_for_again():
    alone = fastest(fleet([0]), equal_layers(), 1)
    assert len(plan(fleet([0, 1]), equal_layers(), alone, 0.001, stages=2).plan.stages) == 2


def test_a_slow_worker_at_the_other_end_does_not_turn_everything_around():
    """Both orders of the workers are nearly as fast; one of them leaves the layers of most where they are."""
    workload = equal_layers(9, parameters=10**6)
    before = fastest(fleet(range(3)), workload, 3)
    for slow in (0, 2):
        found = plan(fleet(range(3), {slow: 3.0}, site=SLOW), workload, before, 100, stages=3).plan
        assert [stage.members for stage in found.stages] == [(0,), (1,), (2,)]
        assert len(found.stages[slow].layers) == 1


def test_if_no_plan_fits_any_more_the_old_one_may_stay():
    before = fastest(fleet(range(2)), equal_layers(), 1)
    with pytest.raises(PlanError, match="3 stages need 3 workers"):
        fastest(fleet(range(2)), equal_layers(), 3)
    assert plan(fleet(range(2)), equal_layers(), before).plan.summary == before.summary


speeds = st.dictionaries(st.integers(0, 5), st.sampled_from([1.0, 2.0, 4.0]))


@few
@given(workloads(), st.integers(1, 4), st.sets(st.integers(0, 3), max_size=2), st.integers(0, 2), speeds, st.floats(0.01, 1e4), st.data())
def test_nothing_considered_is_better_over_the_horizon(workload, workers, lost, joined, slowdowns, horizon, data):
    workload = replace(workload, state_bytes=data.draw(st.sampled_from([0.0, 8.0])))
    left = [worker for worker in range(workers) if worker not in lost]
    assume(left)
    before = fastest(fleet(range(workers)), workload, data.draw(st.sampled_from([None, 1])))
    now = fleet([*left, *range(10, 10 + joined)], slowdowns)
    found = plan(now, workload, before, horizon)

    def over(chosen: Plan) -> float:
        return chosen.step_s * horizon + moving(before, chosen.stages, workload, now).seconds

    assert sorted(found.plan.workers) == sorted(now.workers)
    assert found.plan.step_s * horizon + found.moving.seconds == pytest.approx(over(found.plan))
    for other in (staying(before, now, workload), fastest(now, workload)):
        assert other is None or over(found.plan) <= over(other) * (1 + 1e-9)


@few
@given(workloads(), st.integers(1, 5))
def test_a_plan_that_does_not_change_moves_nothing(workload, workers):
    before = fastest(fleet(range(workers)), workload)
    assert moving(before, before.stages, workload, fleet(range(workers))).bytes == 0
