"""Tests that a change of clocks is weighed against moving layers, and that the reason says what was chosen."""

from __future__ import annotations

import pytest
from test_clocks import gpu

from elastic.errors import PlanError
from elastic.plan.clock_change import Clocking, clocked
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Plan, Stage
from elastic.plan.planner import plan
from elastic.plan.site import LinkSpeed, Site
from elastic.plan.workload import LayerCost, Workload


def workload(layers: int = 8, parameters: int = 1000) -> Workload:
    each = LayerCost(forward_s=0.01, backward_s=0.02, parameters=parameters, activation_bytes=0)
    return Workload(layers=(each,) * layers, micro_batches=16, grains=16, state_bytes=8.0)


def three_of_four(bytes_per_s: float, parameters: int = 1000) -> tuple[Workload, Plan, Fleet]:
    """Four stages of two layers; the worker of the last one is lost, and the workers have links of this speed."""
    work = workload(parameters=parameters)
    before = plan(Fleet(workers=(0, 1, 2, 3)), work, stages=4).plan
    hosts = {worker: f"h{worker}" for worker in range(4)}
    links = {(f"h{a}", f"h{b}"): LinkSpeed(latency_s=1e-4, bytes_per_s=bytes_per_s) for a in range(4) for b in range(a + 1, 4)}
    return work, before, Fleet(workers=(0, 1, 2, 4), hosts=hosts | {4: "h3"}, site=Site(links=links))


def all_alike(**options) -> Clocking:
    return Clocking(mode="speed", choices=dict.fromkeys(range(5), gpu(**options)))


def test_after_a_loss_clocks_rise_with_the_new_layers_and_the_reason_says_so():
    work = workload()
    before = plan(Fleet(workers=(0, 1, 2, 3)), work, stages=4).plan
    found = clocked(Fleet(workers=(0, 1, 3)), work, before, all_alike(), stages=4).plan
    without = plan(Fleet(workers=(0, 1, 3)), work, before, stages=4).plan
    assert len(found.clocks) == 3
    assert 1500 in found.clocks
    assert found.step_s < 0.95 * without.step_s
    assert "rises to 1500 MHz from 1300" in found.why


def test_layers_stay_where_moving_them_costs_more_than_it_gains():
    """Unequal stages: dividing the layers evenly would gain, but takes long to move; clocks alone are chosen."""
    work = workload(parameters=2_000_000_000)
    uneven = Plan(
        stages=tuple(Stage(layers=layers, members=(worker,)) for worker, layers in enumerate((range(3), range(3, 6), range(6, 8)))),
        routes=((0,) * 16, (1,) * 16, (2,) * 16),
        step_s=1.0,
        why="",
    )
    links = {(a, b): LinkSpeed(latency_s=1e-3, bytes_per_s=1e6) for a in "abc" for b in "abc" if a < b}
    fleet = Fleet(workers=(0, 1, 2), hosts=dict(zip(range(3), "abc", strict=True)), site=Site(links=links))
    found = clocked(fleet, work, uneven, all_alike(), stages=3)
    assert [stage.layers for stage in found.plan.stages] == [stage.layers for stage in uneven.stages]
    assert found.plan.clocks
    assert "clocks rise and all layers stay: with clocks alone a step would take" in found.plan.why
    assert found.moving.bytes == 0


def test_layers_and_clocks_change_together_where_both_pay():
    work = workload()
    uneven = Plan(
        stages=(Stage(layers=range(6), members=(0,)), Stage(layers=range(6, 8), members=(1,))),
        routes=((0,) * 16, (1,) * 16),
        step_s=1.0,
        why="",
    )
    found = clocked(Fleet(workers=(0, 1)), work, uneven, all_alike(), stages=2).plan
    assert [stage.layers for stage in found.stages] == [range(4), range(4, 8)]
    assert "layers move and clocks rise" in found.why


def test_layers_go_to_the_gpu_whose_clock_can_rise():
    """Only one of two GPUs can be raised: it gets more layers than it would without clocks."""
    work = workload(layers=16)
    clocking = Clocking(mode="speed", choices={0: gpu(clocks=(1300, 1100, 900), beta=1.0), 1: gpu(clocks=(2600, 1500, 1300), beta=1.0)})
    before = plan(Fleet(workers=(0, 1)), work, stages=2).plan
    found = clocked(Fleet(workers=(0, 1)), work, before, clocking, stages=2).plan
    layers = {stage.members[0]: len(stage.layers) for stage in found.stages}
    assert layers[1] > layers[0]
    assert 2600 in found.clocks


def test_energy_falls_where_stages_wait_and_no_layer_moves_for_it():
    work = workload(layers=7)
    before = plan(Fleet(workers=(0, 1, 2)), work, stages=3).plan
    clocking = Clocking(mode="energy", choices=dict.fromkeys(range(3), gpu()))
    found = clocked(Fleet(workers=(0, 1, 2)), work, before, clocking, stages=3)
    assert [stage.layers for stage in found.plan.stages] == [stage.layers for stage in before.stages]
    assert any(clock is not None and clock < 1300 for clock in found.plan.clocks)
    assert found.plan.step_s <= before.step_s * 1.005


def test_without_known_clocks_the_plan_is_that_without_clocks():
    work, before, fleet = three_of_four(1e9)
    found = clocked(fleet, work, before, Clocking(mode="speed", choices={}), stages=4).plan
    assert found.clocks == ()
    assert found.stages == plan(fleet, work, before, stages=4).plan.stages


def test_plans_with_clocks_are_written_and_read():
    work = workload()
    found = clocked(Fleet(workers=(0, 1)), work, None, all_alike(), stages=2).plan
    assert found.clocks
    assert Plan.from_json(found.to_json()) == found
    assert "clocks" not in plan(Fleet(workers=(0, 1)), work).plan.to_json()
    with pytest.raises(PlanError, match="2 stages have 1 clocks"):
        Plan(stages=found.stages, routes=found.routes, step_s=1.0, why="", clocks=(1300,))
