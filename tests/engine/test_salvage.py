"""Tests that every loss and gradient counts once, for any plans before and after, and any set of finished grains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from elastic.comm.message import MessageKind, Tag
from elastic.engine.boundary import LEAF, Crossing, encode
from elastic.engine.executor import Executor
from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.salvage import Resumption, Salvage, joined
from elastic.engine.shared import SharedMemory
from elastic.engine.tensor_links import tensor_links
from elastic.errors import Interrupted
from elastic.layout.layout import spread
from elastic.memory.tensors import bytes_of
from elastic.plan.plan import Plan, Stage
from elastic.plan.workload import LayerCost, Workload
from elastic.recovery.inventory import Inventory
from elastic.recovery.salvage import restart, usable
from elastic.view import Member, View
from elastic.worker.recovery_client import finished
from tests import dynamo  # noqa: F401

LAYERS, STEP = 5, 7


class Adds(nn.Module):
    """Adds its parameters, times the micro-batch's code: so the gradient of each is a sum of codes that tells whose they are."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)

    def forward(self, value: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        total, code = value
        for parameter in self.own:
            total = total + parameter.sum() * code
        return total * 1.0, code


def parameter(*, frozen: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=not frozen)


def model_of(kinds: Sequence[str]) -> LayeredModel:
    """Layers with parameters, without any, with frozen ones only, and such that use the first layer's."""
    first = parameter()
    made = {"own": lambda: [parameter(), parameter()], "none": list, "frozen": lambda: [parameter(frozen=True)], "tied": lambda: [first]}
    model = LayeredModel([Adds(first), *(Adds(*made[kind]()) for kind in kinds)])
    model.hold(range(LAYERS))
    return model


class Alone:
    """A network on which everybody else has done what is waited for, until the link breaks at the `last` look at it."""

    def __init__(self, worker: int, last: int | None) -> None:
        self.worker, self.left = worker, last

    def check(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted

    def post(self, *_: Any) -> None: ...
    def send(self, *_: Any) -> None:
        self.check()

    def receive(self, _: int, tag: Tag) -> np.ndarray:
        self.check()
        value = torch.ones(1, dtype=torch.float64)
        if tag.kind == MessageKind.GRADIENT:
            crossing = Crossing(structure=None, tensors=(value, None), differentiable=())
        else:
            crossing = Crossing(structure=(LEAF, LEAF), tensors=(value, code(tag.b)), differentiable=(True, False))
        return np.concatenate([np.frombuffer(part, np.uint8) if isinstance(part, bytes) else bytes_of(part) for part in encode(crossing)])


def code(micro_batch: int) -> torch.Tensor:
    return torch.tensor([2.0**micro_batch], dtype=torch.float64)


def batch(_: int, micro_batch: int) -> list[Any]:
    return [(torch.zeros(1, dtype=torch.float64), code(micro_batch))]


@st.composite
def plans(draw: st.DrawFn, workers: Sequence[int], grains: int) -> Plan:
    """Any stages, any members of them, and any worker of its stage for each grain."""
    members = draw(st.permutations(workers))
    depth = draw(st.integers(1, min(LAYERS, len(members))))
    cut = lambda length: [0, *sorted(draw(st.sets(st.integers(1, length - 1), min_size=depth - 1, max_size=depth - 1))), length]  # noqa: E731
    layers, places = cut(LAYERS) if depth > 1 else [0, LAYERS], cut(len(members)) if depth > 1 else [0, len(members)]
    stages = tuple(Stage(layers=range(layers[i], layers[i + 1]), members=tuple(members[places[i] : places[i + 1]])) for i in range(depth))
    routes = tuple(tuple(draw(st.sampled_from(stage.members)) for _ in range(grains)) for stage in stages)
    return Plan(stages=stages, routes=routes, step_s=1.0, why="")


def view_of(plan: Plan, model: LayeredModel, workload: Workload) -> View:
    return View(
        epoch=1,
        attempt=1,
        members=tuple(Member(worker=worker, host="host", address="") for worker in sorted(plan.workers)),
        plan=plan,
        layout=spread(model.spec, [(stage.layers, stage.members) for stage in plan.stages]),
        workload=workload,
    )


def executor_of(worker: int, model: LayeredModel, view: View, last: int | None) -> Executor:
    numerics = Numerics(seed=0, autocast=None, checkpoint=None)
    network: Any = Alone(worker, last)
    shared = SharedMemory(worker, view, {})
    return Executor(worker, model, view, tensor_links(network), numerics, lambda output, _: output[0].sum(), lambda *_: None, shared)


def inventory(worker: int, salvage: Salvage | None) -> Inventory:
    return Inventory(worker=worker, yielded=STEP - 1, copies=(), finished=() if salvage is None else (finished(salvage),))


def workload_of(micro_batches: int, grains: int) -> Workload:
    costs = tuple(LayerCost(forward_s=1.0, backward_s=1.0, parameters=0, activation_bytes=0) for _ in range(LAYERS))
    return Workload(layers=costs, micro_batches=micro_batches, grains=grains)


def plan_of(*stages: tuple[range, tuple[int, ...], tuple[int, ...]]) -> Plan:
    """Returns a plan from layers, members and route of each stage."""
    made = tuple(Stage(layers=layers, members=members) for layers, members, _ in stages)
    return Plan(stages=made, routes=tuple(route for _, _, route in stages), step_s=1.0, why="")


A_ROUTE_CHANGES_WHERE_NOTHING_HAS_A_GRADIENT = (
    ["own", "own", "own", "none"],
    workload_of(2, 2),
    [(plan_of((range(4), (0,), (0, 0)), (range(4, 5), (2,), (2, 2))), {0: 0, 2: 6})],
    plan_of((range(4), (0,), (0, 0)), (range(4, 5), (1, 2), (1, 2))),
)


@st.composite
def courses(draw: st.DrawFn) -> tuple[list[str], Workload, list[tuple[Plan, dict[int, int]]], Plan]:
    """The kinds of layers, some views in which the step is interrupted, with where in it each worker is then, and the last one."""
    kinds = draw(st.lists(st.sampled_from(["own", "none", "frozen", "tied"]), min_size=LAYERS - 1, max_size=LAYERS - 1))
    grains = draw(st.integers(1, 4))
    workload = workload_of(grains * draw(st.integers(1, 2)), grains)
    interrupted = []
    for _ in range(draw(st.integers(1, 2))):
        workers = draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
        interrupted.append((draw(plans(workers, grains)), {worker: draw(st.integers(0, 90)) for worker in workers}))
    return kinds, workload, interrupted, draw(plans(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True)), grains))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(courses())
@example(A_ROUTE_CHANGES_WHERE_NOTHING_HAS_A_GRADIENT)
def test_every_leaf_and_every_grain_sum_is_there_once(course) -> None:
    kinds, workload, interrupted, last = course
    model = model_of(kinds)
    salvages: dict[int, Salvage | None] = {}
    for plan, breaks in [*interrupted, (last, {})]:
        view = view_of(plan, model, workload)
        told = {worker: inventory(worker, salvage) for worker, salvage in salvages.items()}
        inventories = {worker: each for worker, each in told.items() if worker in plan.workers}
        offers = [each for worker, each in told.items() if worker not in plan.workers and worker % 2]  # the even ones left none
        again = restart(view, STEP, inventories, offers, dict.fromkeys(told, "host"))
        assert all(len(route) == workload.grains for route in again.routes)
        resumed = dataclasses.replace(view, plan=dataclasses.replace(plan, routes=again.routes))
        executors = {worker: executor_of(worker, model, resumed, breaks.get(worker)) for worker in plan.workers}
        leaves = []
        for worker, executor in executors.items():
            own = salvages.get(worker)
            if own is not None and not usable(view, again.routes, inventories[worker], STEP):
                own = own.without_sums
            found = [salvages[other] for other, heir in again.heirs if heir == worker]
            salvage = joined(own, [each for each in found if each is not None])
            executor.resume(Resumption(step=STEP, grains=frozenset(again.finished), salvage=salvage))
            try:
                leaves += executor.step(STEP, batch)
            except Interrupted:
                assert breaks
        salvages = {worker: next(iter(executor.salvages()), None) for worker, executor in executors.items()}
    assert sorted(leaf.micro_batch for leaf in leaves) == list(range(workload.micro_batches))
    sums = {worker: executor.reducer.sums() for worker, executor in executors.items()}
    for vector in model.vectors:
        stage = next(stage for stage in last.stages if vector.layer in stage.layers)
        nodes = [(node, parts) for worker in stage.members for node, parts in sums[worker].get(vector.id, {}).items()]
        covered = sorted(grain for node, _ in nodes for grain in node.grains(workload.grains))
        assert covered == list(range(workload.grains)), f"layer {vector.layer}"
        for index, _ in enumerate(vector.parameters):
            total = sum(float(parts[index][0]) for _, parts in nodes)
            assert total == 2.0**workload.micro_batches - 1, f"layer {vector.layer}"


class Loses(Alone):
    """A network whose links break when gradient sums are sent."""

    def send(self, _: int, tag: Tag, *__: Any) -> None:
        if tag.kind == MessageKind.PARTIAL:
            raise Interrupted


def test_a_gradient_in_flight_stays_what_it_is_if_links_break_when_its_sum_is_sent() -> None:
    """Sums are added to gradients in place, and the sums cannot be kept, since the stage gets more layers."""
    model, workload = model_of(["own"] * (LAYERS - 1)), workload_of(4, 4)
    before = plan_of((range(2), (0,), (0, 0, 0, 0)), (range(2, LAYERS), (1, 2), (1, 1, 2, 2)))
    executor = executor_of(1, model, view_of(before, model, workload), None)
    network: Any = Loses(1, None)
    executor.reducer._links = tensor_links(network)
    with pytest.raises(Interrupted):
        executor.step(STEP, batch)
    (salvage,) = executor.salvages()
    alone = view_of(plan_of((range(LAYERS), (1,), (1, 1, 1, 1))), model, workload)
    assert not usable(alone, alone.plan.routes, inventory(1, salvage), STEP)
    again = executor_of(1, model, alone, None)
    again.resume(Resumption(step=STEP, grains=frozenset(), salvage=salvage.without_sums))
    again.step(STEP, batch)
    for number, nodes in again.reducer.sums().items():
        found = [float(part[0]) for parts in nodes.values() for part in parts if part is not None]
        assert sum(found) / len(model.vectors[number].parameters) == 2.0**4 - 1, f"layer {model.vectors[number].layer}"


def stop_at(phase: str, micro_batch: int = 0) -> Callable[..., None]:
    """Returns a callback that interrupts a step where it enters a phase."""

    def entered(entered_phase: str, _: int, entered_micro_batch: int) -> None:
        if (entered_phase, entered_micro_batch) == (phase, micro_batch):
            raise Interrupted

    return entered


def test_the_sums_of_a_step_are_kept_until_the_next_one_has_some() -> None:
    """A member that has not applied the step may die until then: all go back, and nothing of it is computed again."""
    model, workload = model_of(["own"] * (LAYERS - 1)), workload_of(4, 4)
    view = view_of(plan_of((range(LAYERS), (0,), (0, 0, 0, 0))), model, workload)
    executor = executor_of(0, model, view, None)
    executor.step(STEP, batch)
    expected = {number: [float(part[0]) for parts in nodes.values() for part in parts] for number, nodes in executor.reducer.sums().items()}
    executor.retire()
    (past,) = executor.salvages()
    assert (past.step, past.grains, len(past.leaves)) == (STEP, frozenset(range(4)), 4)

    executor._enter = stop_at("backward")
    with pytest.raises(Interrupted):
        executor.step(STEP + 1, batch)
    now, past = executor.salvages()
    assert (now.step, now.grains, past.step, past.grains) == (STEP + 1, frozenset(), STEP, frozenset(range(4)))
    again = executor_of(0, model, view, None)
    again.resume(Resumption(step=STEP, grains=past.grains, salvage=past))
    leaves = again.step(STEP, batch)
    assert [leaf.micro_batch for leaf in leaves] == [0, 1, 2, 3]
    assert again.micro_batches_run == 0
    found = {number: [float(part[0]) for parts in nodes.values() for part in parts] for number, nodes in again.reducer.sums().items()}
    assert found == expected

    executor._enter = stop_at("backward", 3)
    with pytest.raises(Interrupted):
        executor.step(STEP + 1, batch)
    (now,) = executor.salvages()
    assert (now.step, now.grains) == (STEP + 1, frozenset({0, 1, 2}))
