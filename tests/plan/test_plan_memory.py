"""Tests the memory of stages: refusals if it is too small, divisions that fit it, and agreement with measured memory."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import few, fleet

from elastic.errors import PlanError
from elastic.plan.fleet import Fleet
from elastic.plan.memory import need, needs, needs_in, readable, shortfall, subtrees
from elastic.plan.plan import Stage
from elastic.plan.planner import fastest, plan, staying
from elastic.plan.search import nameless
from elastic.plan.site import Site
from elastic.plan.uneven import divide_within
from elastic.plan.workload import LayerCost, Workload
from elastic.view import Member

BIG = LayerCost(forward_s=0.01, backward_s=0.02, parameters=1_000_000, activation_bytes=100_000, output_bytes=10_000)


def workload(layers: int = 6) -> Workload:
    return Workload(layers=(BIG,) * layers, micro_batches=8, grains=8, state_bytes=8.0)


def test_what_is_needed_is_the_sum_of_what_is_kept():
    found = need(workload(), range(2, 4), members=2, workers=4, ahead=2, grains=4)
    assert found.parameters == 2 * 4e6
    assert found.states == 2 * 8e6 / 2
    assert found.previous_copy == 2 * 12e6 / 2
    assert found.replicas == 6 * (4e6 + 2 * (4e6 + 8e6)) / 4
    assert found.gradients == 2 * 4e6 * (subtrees(4) + 1 / 2)
    assert found.activations == 2 * (200_000 + 10_000)
    assert str(found).startswith("8 MB parameters, ")
    assert need(workload(), range(6), members=1, workers=1, ahead=1, grains=8).replicas == 0


def test_the_gradient_that_is_added_to_the_sum_of_its_grain_is_counted():
    """In the first stage only that of a layer, since each is added before the next is computed."""
    several = replace(workload(), micro_batches=24)
    for layers, grains, more in ((range(2, 4), 4, 8e6), (range(3), 4, 4e6), (range(2, 4), 0, 0.0)):
        one, other = (need(each, layers, 2, 4, 2, grains, outlive=True).gradients for each in (workload(), several))
        assert other - one == more


def test_each_further_copy_of_the_state_is_counted():
    one, two, three = (need(workload(), range(2, 4), 2, 6, 2, 4, replicas=replicas) for replicas in range(3))
    assert (one.replicas, one.kept_copy) == (0, 0)
    assert three.replicas == 2 * two.replicas > 0
    assert three.total - two.total == two.replicas
    stages, routes = [Stage(layers=range(6), members=(0, 1, 2))], [(0, 0, 0, 1, 1, 1, 2, 2)]
    kept = [needs(workload(), stages, routes, replicas=replicas)[0].replicas for replicas in range(4)]
    assert kept == [0, kept[1], 2 * kept[1], 3 * kept[1]]


def of_hosts(hosts: str, copies: int, memory: int | None = None) -> Fleet:
    limits = {} if memory is None else dict.fromkeys(range(len(hosts)), memory)
    return Fleet(workers=(0, 1, 2), hosts=dict(enumerate(hosts)), site=Site(copies=copies), memory=limits, outlive=True)


@pytest.mark.parametrize(
    ("copies", "hosts", "replicas"), [(1, "abc", 0), (2, "abc", 1), (3, "abc", 2), (3, "aab", 1), (3, "aaa", 0), (9, "abc", 2)]
)
def test_a_fleet_keeps_as_many_copies_as_it_has_hosts(copies: int, hosts: str, replicas: int):
    assert of_hosts(hosts, copies).replicas == replicas


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_plan_must_fit_with_all_its_copies(copies: int):
    stages, routes = [Stage(layers=range(6), members=(0, 1, 2))], [(0, 0, 0, 1, 1, 1, 2, 2)]
    needed = round(max(each.total for each in needs(workload(), stages, routes, replicas=copies - 1, outlive=True).values())) + 1
    assert len(fastest(of_hosts("abc", copies, needed), workload(), 1).stages) == 1
    if copies < 3:
        with pytest.raises(PlanError, match="does not fit into memory"):
            fastest(of_hosts("abc", copies + 1, needed), workload(), 1)


def test_on_a_device_copies_and_staging_lie_on_the_host():
    """Two copies and one that is kept or saved; sums of gradients do not outlive the process, and are added to in place."""
    host, found = (need(workload(), range(2, 4), 2, 4, 2, 4, outlive=True, on_device=on_device) for on_device in (False, True))
    assert (host.host_bytes, host.device_bytes, host.staging) == (host.total, 0.0, 0.0)
    assert host.gradients - found.gradients == 2 * 4e6
    assert found.device_bytes == found.parameters + found.states + found.replicas + found.gradients + found.activations + 2 * 4e6 / 2
    assert found.host_bytes == 3 * 2 * 12e6 / 2 + found.staging
    assert found.staging == 2 * 4e6 * (1 + 1 / 2) + 2 * 10_000
    assert found.total == found.host_bytes + found.device_bytes
    assert need(workload(), range(6), 1, 1, 1, 8, on_device=True).staging == 0
    assert found.described(on_device=False) == "24 MB previous copy, 12 MB kept copy, 12 MB staging"


def test_what_is_not_trained_is_held_once_by_a_stage_and_once_by_holders_of_replicas():
    layers = tuple(replace(each, frozen_bytes=5_000_000) for each in workload().layers)
    for on_device in (False, True):
        plain, found = (
            need(each, range(2, 4), 2, 4, 2, 4, on_device=on_device) for each in (workload(), replace(workload(), layers=layers))
        )
        assert found.parameters - plain.parameters == 2 * 5e6
        assert found.replicas - plain.replicas == 6 * 5e6 / 4
        assert found.previous_copy - plain.previous_copy == 2 * 5e6 / 2 * on_device, "of a device: what is owned, for the host"
        assert found.total - plain.total == 2 * 5e6 + 6 * 5e6 / 4 + 2 * 5e6 / 2 * on_device


def on_devices(workers: int, limit: int | None, host: int | None = None, **more: Any) -> Fleet:
    limits = ({} if bytes_ is None else dict.fromkeys(range(workers), bytes_) for bytes_ in (host, limit))
    return fleet(range(workers), memory=next(limits), device_memory=next(limits), on_device=True, outlive=True, **more)


def test_a_plan_that_fits_the_devices_is_chosen_over_a_faster_one():
    whole = fastest(on_devices(2, None), workload())
    assert len(whole.stages) == 1
    half = [Stage(layers=range(3), members=(0,)), Stage(layers=range(3, 6), members=(1,))]
    tight = round(max(each.device_bytes for each in needs_in(workload(), half, [(0,) * 8, (1,) * 8], on_devices(2, None)).values())) + 1
    found = fastest(on_devices(2, tight), workload())
    assert len(found.stages) == 2
    assert found.step_s >= whole.step_s
    assert len(fastest(on_devices(2, None, host=10 * tight), workload()).stages) == 1
    with pytest.raises(
        PlanError, match=r"needs [\d.]+ MB of device memory on worker \d, which is \d+ bytes more than .* use of its device"
    ):
        fastest(on_devices(2, tight - 2), workload())


def test_memory_of_the_host_limits_workers_on_devices_too():
    with pytest.raises(PlanError, match=r"bytes more than the 20 MB it has besides its process \(\d+ MB previous copy, [^(]* staging\)"):
        fastest(on_devices(2, 1 << 40, host=20_000_000), workload())


def test_a_small_device_gets_fewer_layers():
    uneven = [Stage(layers=range(4), members=(0,)), Stage(layers=range(4, 6), members=(1,))]
    tight = round(needs(workload(), uneven, [(0,) * 8, (1,) * 8], replicas=0, outlive=True, on_device=True)[1].device_bytes) + 1
    small = fleet(range(2), device_memory={1: tight}, on_device=True, outlive=True)
    assert [len(stage.layers) for stage in fastest(small, workload(), 2).stages] == [4, 2]
    assert not small.memory_alike
    assert nameless(small).device_memory == small.device_memory
    assert nameless(small).on_device


def test_layers_do_not_stay_where_the_device_has_no_room():
    before = fastest(on_devices(3, None), workload(), 1)
    assert len(plan(on_devices(2, None), workload(), before).plan.stages) == 1
    half = [Stage(layers=range(3), members=(0,)), Stage(layers=range(3, 6), members=(1,))]
    tight = round(max(each.device_bytes for each in needs_in(workload(), half, [(0,) * 8, (1,) * 8], on_devices(2, None)).values())) + 1
    assert len(plan(on_devices(2, tight), workload(), before).plan.stages) == 2


def test_a_fleet_knows_the_devices_of_its_members():
    members = [Member(worker=number, host="a", address="", device="cuda", device_memory=limit) for number, limit in enumerate((1000, None))]
    found = Fleet.of([Member.from_json(member.to_json()) for member in members], Site())
    assert found.on_device
    assert found.device_memory == {0: 900}
    assert not Fleet.of([Member(worker=0, host="a", address="")], Site()).on_device


def test_a_model_that_fits_nowhere_says_where_and_by_how_much():
    memory = dict.fromkeys(range(2), 20_000_000)
    with pytest.raises(
        PlanError, match=r"2 stages. In the closest plan, stage \d \(layers \d to \d\) needs [\d.]+ MB on worker \d, which is \d+ bytes"
    ):
        fastest(fleet(range(2), memory=memory), workload(), 2)
    with pytest.raises(PlanError, match="in 1 to 2 stages"):
        fastest(fleet(range(2), memory=memory), workload())


def test_one_with_little_memory_gets_fewer_layers():
    whole = fastest(fleet(range(2)), workload(), 2)
    assert [len(stage.layers) for stage in whole.stages] == [3, 3]
    uneven = [Stage(layers=range(4), members=(0,)), Stage(layers=range(4, 6), members=(1,))]
    tight = needs(workload(), uneven, [(0,) * 8, (1,) * 8])[1].total
    assert tight < needs(workload(), whole.stages, whole.routes)[1].total
    found = fastest(fleet(range(2), memory={1: int(tight) + 1}), workload(), 2)
    assert [len(stage.layers) for stage in found.stages] == [4, 2]


def test_stages_that_do_not_fit_are_replaced_by_more_of_them():
    """A step in one stage is as fast, and there are fewer: but every worker would hold everything."""
    small = need(workload(), range(3), members=1, workers=2, ahead=2, grains=8).total
    assert len(fastest(fleet(range(2)), workload()).stages) == 1
    assert len(fastest(fleet(range(2), memory=dict.fromkeys(range(2), int(small) + 1)), workload()).stages) == 2


def fits(cut: tuple[int, ...], widths: tuple[int, ...], given_memory: dict[int, int], costs: Workload) -> bool:
    workers, at = sum(widths), 0
    edges = [0, *cut, len(costs.layers)]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        grains = -(-costs.grains // widths[number])
        needed = need(costs, range(start, stop), widths[number], workers, len(widths) - number, grains).total
        if any(needed > given_memory.get(worker, float("inf")) for worker in range(at, at + widths[number])):
            return False
        at += widths[number]
    return True


@few
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(2, 4), st.integers(1, 3), st.data())
def test_a_division_within_memory_is_found_if_there_is_one(sizes, workers, stages, data):
    stages = min(stages, workers, len(sizes))
    costs = replace(workload(), layers=tuple(replace(BIG, parameters=size * 1000, activation_bytes=size * 500) for size in sizes))
    limits = {worker: data.draw(st.integers(20_000, 900_000)) for worker in range(workers)}
    cuts = itertools.combinations(range(1, len(sizes)), stages - 1)
    widths = [each for each in itertools.product(range(1, workers + 1), repeat=stages) if sum(each) == workers]
    possible = {(cut, width) for cut in cuts for width in widths if fits(cut, width, limits, costs)}
    found = divide_within(costs, fleet(range(workers), memory=limits), stages)
    if found is None:
        assert not possible
    else:
        assert (tuple(layers.stop for layers, _ in found[:-1]), tuple(count for _, count in found)) in possible


def test_a_stage_that_would_not_hold_its_share_does_not_stay():
    before = fastest(fleet(range(3)), workload(), 1)
    left = fleet([0, 1], memory={0: 10, 1: 10})
    stayed = staying(before, left, workload())
    assert stayed is not None
    lacking, said = shortfall(workload(), stayed.stages, stayed.routes, left)
    assert lacking > 0
    assert "stage 0 (layers 0 to 5)" in said
    assert shortfall(workload(), stayed.stages, stayed.routes, fleet([0, 1])) == (0.0, "")


def test_sizes_are_readable():
    assert [readable(size) for size in (0, 999, 1500, 2.5e9)] == ["0 bytes", "999 bytes", "1.5 kB", "2.5 GB"]


def test_a_stage_of_nobody_needs_nothing():
    lonely = [Stage(layers=range(6), members=(0,))]
    assert shortfall(workload(), lonely, [(0,) * 8], fleet([0])) == (0.0, "")
