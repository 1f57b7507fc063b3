"""Tests plans in files: round trips, and refusals that name the difference if a plan is for another job."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_strategies import cost, few, fleet, planned

from elastic.errors import PlanError
from elastic.plan.plan import Plan, Stage
from elastic.plan.planner import fastest
from elastic.plan.planner import given as begun_with
from elastic.plan.saved import VERSION, SavedPlan, load, save
from elastic.plan.workload import Workload

WORKLOAD = Workload(layers=(cost(0.01, 0.02, 1000),) * 6, micro_batches=8, grains=8)


def saved(workers: int = 4, hosts: str = "", **changes) -> SavedPlan:
    workload = dataclasses.replace(WORKLOAD, **changes)
    names = dict(enumerate(hosts or "h" * workers))
    return SavedPlan.of(fastest(fleet(range(workers)), workload, 2), names, workload)


@st.composite
def saved_plans(draw) -> SavedPlan:
    """Any stages and routes, some with groups of several devices."""
    workload, stages, routes = draw(planned())
    sizes = draw(st.sampled_from([None, *range(1, 4)]))
    wide = []
    for stage in stages:
        groups = tuple(tuple(sizes * member + rank for rank in range(sizes)) for member in stage.members) if sizes else ()
        wide.append(Stage(layers=stage.layers, members=tuple(group[0] for group in groups) or stage.members, groups=groups))
    named = tuple(tuple(worker * (sizes or 1) for worker in route) for route in routes)
    plan = Plan(stages=tuple(wide), routes=named, step_s=draw(st.floats(0, 1e300)), why=draw(st.text()))
    return SavedPlan(
        plan=plan,
        hosts=tuple(draw(st.lists(st.text(), min_size=len(plan.devices), max_size=len(plan.devices)))),
        parameter_bytes=tuple(layer.parameter_bytes for layer in workload.layers),
        micro_batches=workload.micro_batches,
        micro_batch=draw(st.none() | st.integers(1, 64)),
    )


@few
@given(saved_plans())
def test_a_plan_reads_back_from_its_file_as_it_was(tmp_path_factory, plan):
    path = tmp_path_factory.getbasetemp() / "plan.toml"
    save(plan, path)
    assert load(path) == plan
    assert SavedPlan.from_json(plan.to_json()) == plan


@few
@given(planned(), st.integers(0, 3))
def test_a_job_like_the_one_that_it_is_for_begins_with_it(case, first):
    workload, stages, routes = case
    plan = Plan(stages=stages, routes=routes, step_s=1.0, why="")
    count = len(plan.workers)
    file = SavedPlan.of(plan, dict.fromkeys(range(count), "h"), workload)
    begun = begun_with(file, fleet(range(first, first + count)), workload)
    assert [stage.members for stage in begun.stages] == [tuple(worker + first for worker in stage.members) for stage in stages]
    assert begun.routes == tuple(tuple(worker + first for worker in route) for route in routes)


@pytest.mark.parametrize(
    ("workers", "hosts", "change", "said"),
    [
        (3, "", {}, "it is for 4 workers, and this job has 3"),
        (4, "aabb", {}, r"its workers are on 1 host \(4\), and this job's on 2 hosts \(2, 2\)"),
        (4, "", {"layers": WORKLOAD.layers[:5]}, "its model has 6 layers, and this job's 5"),
        (4, "", {"layers": (*WORKLOAD.layers[:5], cost(0.1, 0.1, 1020))}, "layer 5 has 4000 bytes of parameters, and this job's 4080"),
        (4, "", {"grains": 4}, "into 8 micro-batches in 8 grains, and this job into 8 in 4"),
        (4, "", {"micro_batches": 16, "grains": 16}, "into 8 micro-batches in 8 grains, and this job into 16 in 16"),
        (2, "", {"layers": WORKLOAD.layers[:5]}, "this job has 2; its model has 6 layers, and this job's 5"),
    ],
)
def test_another_job_is_refused_saying_what_differs(workers, hosts, change, said):
    there = fleet(range(workers), hosts=dict(enumerate(hosts)))
    with pytest.raises(PlanError, match=rf"the saved plan is for another job: .*{said}"):
        begun_with(saved(), there, dataclasses.replace(WORKLOAD, **change))


def test_padding_of_parameters_is_not_another_model():
    padded = dataclasses.replace(WORKLOAD, layers=(cost(0.01, 0.02, 1008),) * 6)
    assert begun_with(saved(), fleet(range(4)), padded).summary == saved().plan.summary


def test_a_plan_that_does_not_fit_into_memory_is_refused():
    with pytest.raises(PlanError, match=r"the saved plan does not fit into memory: stage 0 .* Make one for this machine"):
        begun_with(saved(), fleet(range(4), memory=dict.fromkeys(range(4), 5000)), WORKLOAD)


def test_tensor_parallel_plans_are_for_people_only_so_far():
    stage = Stage(layers=range(6), members=(0, 2), groups=((0, 1), (2, 3)))
    plan = Plan(stages=(stage,), routes=((0, 2),), step_s=1.0, why="")
    file = SavedPlan(plan=plan, hosts=("h",) * 4, parameter_bytes=(4000,) * 6, micro_batches=8)
    with pytest.raises(PlanError, match="tensor parallelism, which jobs do not support yet"):
        begun_with(file, fleet(range(4)), WORKLOAD)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (f"version = {VERSION}", "version = 9", rf"version is 9, and this elastic reads version {VERSION}"),
        (f"version = {VERSION}", "", "version is missing"),
        ("step_s = ", "step_s = true # ", "step_s must be a number, not True"),
        ("layers = [0, 3]", "layers = [0, 2]", "stage 1 has layers"),
        ("layers = [0, 3]", "layers = [0]", r"stages\[0\]\.layers must be the first layer and one past the last"),
        ("members = [0, 1]", 'members = [0, "1"]', r"stages\[0\]\.members\[1\] must be a whole number, not '1'"),
        ("members = [0, 1]", "members = [0, 2]", "two places"),
        ("member_of_grain = [0,", "member_of_grain = [3,", r"routes of stage 0 name workers \[3\]"),
        ("micro_batches = 8", "micro_batches = 9", "9 micro-batches cannot be cut into the 8 grains"),
        ('hosts = ["h",', 'hosts = ["h", "h",', "5 places have a host"),
        ("parameter_bytes = [4000,", "parameter_bytes = [4000, 4000,", "the stages hold 6 layers, and the model has 7"),
        ("[[stages]]", "[[stages", "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, old, new, said):
    path, text = tmp_path / "plan.toml", saved().to_toml()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PlanError, match=said) as caught:
        load(path)
    assert str(caught.value).startswith(f"the plan {path} ")


def test_a_step_of_no_grains_is_refused():
    whole = SavedPlan.of(fastest(fleet(range(2)), WORKLOAD, 1), {0: "h", 1: "h"}, WORKLOAD).to_json()
    whole["stages"][0]["member_of_grain"] = []
    with pytest.raises(PlanError, match="8 micro-batches cannot be cut into the 0 grains"):
        SavedPlan.from_json(whole)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path):
    with pytest.raises(PlanError, match=r"absent\.toml cannot be read: No such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(PlanError, match="cannot be written"):
        save(saved(), tmp_path / "no" / "plan.toml")


def test_the_text_is_for_people():
    text = saved().to_toml()
    assert "layers = [0, 3]\nmembers = [0, 1]\nmember_of_grain = [0, 0, 0, 0, 1, 1, 1, 1]" in text
    assert list(accumulate(map(len, text.splitlines()), max))[-1] < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10) | st.floats() | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["layers", "hosts"]), inner, max_size=2),
    max_leaves=4,
)


def paths(value, before=()):
    yield before
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*before, key))


@few
@given(st.data())
def test_whatever_is_in_a_file_is_a_plan_or_refused(data):
    written = saved().to_json()
    *way, last = data.draw(st.sampled_from([path for path in paths(written) if path]))
    spot = written
    for key in way:
        spot = spot[key]
    if isinstance(spot, dict) and data.draw(st.booleans()):
        del spot[last]
    else:
        spot[last] = data.draw(JSON)
    try:
        SavedPlan.from_json(written)
    except PlanError as error:
        assert str(error)  # noqa: PT017
