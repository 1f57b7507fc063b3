"""Tests divisions against exhaustive search, their limits of memory, devices and layers, and messages if nothing fits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from division_fakes import FakeRules, best_step_s, fake_rules, within
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import PlanError
from elastic.plan.division.costs import costs
from elastic.plan.division.division import Division, Section
from elastic.plan.division.rules import Transfers
from elastic.plan.division.search import SearchLimits, divide
from elastic.plan.division.shapes import Makeup, Pool, ReplicaCount, Shape, alike, meeting, together

some = settings(max_examples=60, deadline=None)
PLAIN = Transfers(first=(1.0,), middle=1.0, last=1.0)


def rules(**changed: object) -> FakeRules:
    plain = FakeRules(
        pools=(Pool("big", "here", 2), Pool("small", "here", 4)),
        layer_s=((1.0,) * 4, (3.0,) * 4),
        parameters=(2.0,) * 4,
        activations=(1.0,) * 4,
        capacity=(40.0, 20.0),
        transfer_s=(0.0, 0.125, 0.125, 0.125),
        transfers=PLAIN,
        sync_s_per_parameter=0.125,
    )
    return replace(plain, **changed)  # type: ignore[arg-type]


@pytest.mark.slow
@some
@given(fake_rules(), st.integers(1, 12))
def test_the_result_is_the_best_of_all_plans(fake, batch):
    best = best_step_s(fake, batch)
    if best is None:
        with pytest.raises(PlanError, match=r"bytes short|too few devices"):
            divide(fake, batch)
        return
    plan = divide(fake, batch)
    assert plan.exact
    assert plan.step_s == pytest.approx(best, rel=1e-9)


@pytest.mark.slow
@some
@given(fake_rules(most_layers=6), st.integers(1, 40), st.booleans())
def test_plans_keep_to_layers_memory_and_devices_and_cost_what_they_say(fake, batch, mixed):
    try:
        plan = divide(fake, batch, SearchLimits(mixed=mixed))
    except PlanError:
        return
    assert [layer for stage in plan.stages for layer in stage.layers] == list(range(fake.layers))
    assert within(fake, plan.stages)
    assert plan.micro_batches * plan.micro_batch * plan.replicas >= batch
    told = costs(fake, plan.stages, plan.micro_batch, plan.micro_batches)
    assert told.fits
    assert told.step_s == pytest.approx(plan.step_s, rel=1e-9)


@pytest.mark.slow
@some
@given(fake_rules(), st.integers(1, 20))
def test_mixed_stages_never_make_it_worse(fake, batch):
    try:
        alone = divide(fake, batch)
    except PlanError:
        return
    assert divide(fake, batch, SearchLimits(mixed=True)).step_s <= alone.step_s * (1 + 1e-12)


def test_a_mixed_stage_uses_what_is_left_of_two_kinds():
    odd = rules(pools=(Pool("big", "here", 1), Pool("small", "here", 1)), layer_s=((1.0,), (1.125,)), parameters=(2.0,), activations=(1.0,))
    odd = replace(odd, transfer_s=(0.0,))
    assert divide(odd, 8).replicas == 1
    plan = divide(odd, 8, SearchLimits(mixed=True))
    assert plan.replicas == 2
    assert plan.step_s < divide(odd, 8).step_s


def test_the_sum_over_stages_counts_not_only_the_slowest_stage():
    """One micro-batch: two stages would only add transfers, however well balanced."""
    plan = divide(rules(pools=(Pool("big", "here", 2), Pool("small", "here", 1))), 1)
    assert len(plan.stages) == 1


def test_a_layer_that_fits_on_no_device_is_named():
    with pytest.raises(PlanError, match=r"layer 2 fits on no device.* 12 bytes short on big with tensor parallelism 2"):
        divide(rules(parameters=(2.0, 2.0, 103.0, 2.0), layer_s=((1.0,) * 4,) * 2), 8)


def test_layers_that_only_fit_one_by_one_are_explained():
    with pytest.raises(
        PlanError, match=r"layers 0 to 1 fill all devices \(big\) and layer 2 fits nowhere: every device is \d+ bytes short"
    ):
        divide(rules(pools=(Pool("big", "here", 1),), capacity=(7.0,), layer_s=((1.0,) * 4,)), 8)


def test_stages_that_are_not_connected_are_no_plan():
    apart = rules(pools=(Pool("big", "here", 1), Pool("small", "here", 1)), capacity=(11.0, 11.0), transfer_s=(0.0, *[math.inf] * 3))
    with pytest.raises(PlanError, match="fit into memory, but no stages that do are connected"):
        divide(apart, 8)


def test_no_profile_for_what_is_there_is_said():
    with pytest.raises(PlanError, match=r"no profile for 2 big, 4 small \(micro-batch sizes \[\]\)"):
        divide(rules(), 8, SearchLimits(sizes=(16,)))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(PlanError, match="global batch of 0"):
        divide(rules(), 0)


def test_the_summary_names_layers_replicas_and_kinds():
    plan = divide(rules(), 8)
    assert plan.summary(rules().pools).startswith(f"mbs {plan.micro_batch}, {plan.micro_batches} micro-batches: [0-")


def test_replicas_of_adjacent_stages_meet_in_order():
    one, two, three = Shape(0, 1), Shape(1, 1), Shape(1, 2)
    assert meeting(together([one, one, two]), alike(three, 3)) == {(one, three), (two, three)}
    assert meeting(together([one, one, two]), together([two, three, three])) == {(one, two), (one, three), (two, three)}
    assert meeting(alike(one, 4), together([two, three])) == {(one, two), (one, three)}


def test_plans_refuse_gaps_and_unequal_replicas():
    stages = (Section(layers=range(1), makeup=alike(Shape(0, 1), 1)), Section(layers=range(2, 3), makeup=alike(Shape(0, 1), 1)))
    with pytest.raises(PlanError, match="layer 1 comes next"):
        Division(micro_batch=1, micro_batches=1, stages=stages, step_s=1.0, exact=True)
    stages = (stages[0], Section(layers=range(1, 3), makeup=alike(Shape(0, 1), 2)))
    with pytest.raises(PlanError, match="equally many replicas"):
        Division(micro_batch=1, micro_batches=1, stages=stages, step_s=1.0, exact=True)
    with pytest.raises(PlanError, match="at least one"):
        Makeup((ReplicaCount(Shape(0, 1), 0),))
