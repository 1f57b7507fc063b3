"""Tests restoring a checkpoint into any layout: the same bits, and only the parts that the layout needs are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn, optim

from elastic.checkpoint.state import PARAM, Contents, Spec
from elastic.engine.bit_equality import same
from elastic.engine.model import LayeredModel
from elastic.engine.probe import probe
from elastic.engine.shard import RUN, Scalars, Shard
from elastic.engine.view_state import initial_state
from elastic.engine.zero import ShardedOptimizer
from elastic.errors import CheckpointError, TrainerError
from elastic.layout.layout import Interval, spread
from elastic.layout.regions import LayerSpec, ModelSpec, ParameterSpec
from elastic.plan.fleet import Fleet
from elastic.plan.planner import fastest
from elastic.plan.workload import LayerCost, Workload
from elastic.view import Member, View
from elastic.worker.restore import numbers, restored_state, runs
from elastic.worker.savable_state import check_savable, empty_states
from elastic.worker.saving import contents_of, states_of
from tests.engine import models

Values = dict[tuple[str, str], torch.Tensor]


class Memory:
    """A checkpoint in memory, that counts what is read."""

    format = "memory"

    def __init__(self, contents: Contents, values: Values) -> None:
        self.contents, self.values, self.elements = contents, values, 0

    def read(self, name: str, state: str, start: int, stop: int) -> torch.Tensor:
        self.elements += stop - start
        return self.values[name, state][start:stop].clone()

    def read_into(self, name: str, state: str, start: int, values: torch.Tensor) -> None:
        values.copy_(self.read(name, state, start, start + values.numel()))

    def close(self) -> None:
        pass


class Worker:
    """One worker's model and optimizer. Like every worker, it builds the whole model first."""

    def __init__(self, build: Callable[[], list[nn.Module]], optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        torch.manual_seed(5)
        layers = build()
        for layer in layers[1:2]:
            next(layer.parameters()).requires_grad_(False)
            layer.register_buffer("seen", torch.arange(3.0))
        self.model = LayeredModel(layers)
        trained = [p for p in self.model.root.parameters() if p.requires_grad]
        self.optimizer = ShardedOptimizer(optimizer(trained), self.model)


def view_of(model: LayeredModel, workers: int, stages: int) -> View:
    costs = tuple(LayerCost(forward_s=0.1, backward_s=0.2, parameters=9, activation_bytes=0) for _ in model.layers)
    workload = Workload(layers=costs, micro_batches=8, grains=8)
    chosen = fastest(Fleet(workers=tuple(range(workers))), workload, stages)
    layout = spread(model.spec, [(stage.layers, stage.members) for stage in chosen.stages], dict.fromkeys(range(workers), "host"))
    members = tuple(Member(worker=worker, host="host", address="") for worker in range(workers))
    return View(epoch=1, attempt=0, members=members, plan=chosen, layout=layout, workload=workload)


def given(spec: Any, shards: Sequence[tuple[Shard, Scalars]], sizes: dict[str, int]) -> Values:
    """Returns what workers provide together, every element once."""
    found: Values = {}
    seen: dict[tuple[str, str], int] = {}
    for shard, scalars in shards:
        for name, state, start, values in runs(shard, scalars, spec):
            whole = found.setdefault((name, state), torch.full((sizes[name],), torch.nan, dtype=values.dtype))
            whole[start : start + len(values)] = values
            seen[name, state] = seen.get((name, state), 0) + len(values)
    assert all(count == sizes[name] for (name, _), count in seen.items())
    return found


def trained(build: Any, optimizer: Any, workers: int, stages: int) -> tuple[Memory, dict[str, dict[str, Any]]]:
    """A checkpoint of `workers` that have taken three steps with random gradients."""
    shards: list[tuple[Shard, Scalars]] = []
    scalars: dict[str, dict[str, Any]] = {}
    for number in range(workers):
        worker = Worker(build, optimizer)
        view = view_of(worker.model, workers, stages)
        state = initial_state(number, worker.model, worker.optimizer, view)
        updater = worker.optimizer.owned
        updater.bind(state.owned)
        for step in range(3):
            gradients = {
                key: [torch.randn(b - a, generator=torch.Generator().manual_seed(step)) for _, a, b in shard.parameters(worker.model.spec)]
                for key, shard in updater.shards.items()
            }
            updater.step(gradients)
        for shard in updater.shards.values():
            own = updater.scalars(shard)
            shards.append((shard, own))
            scalars |= numbers(own)
    model = Worker(build, optimizer).model
    sizes = {p.name: p.size for layer in model.spec.layers for p in layer.parameters}
    values = given(model.spec, shards, sizes)
    shapes = {p.name: p.shape for layer in model.spec.layers for p in layer.parameters}
    rest = {name: model.parameter(name) for name in model.frozen} | dict(model.root.named_buffers())
    values |= {(name, PARAM): 10 + tensor.detach().reshape(-1) for name, tensor in rest.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in rest.items()}
    tensors: dict[str, dict[str, Spec]] = {}
    for (name, state), whole in values.items():
        tensors.setdefault(name, {})[state] = Spec(shape=shapes[name], dtype=str(whole.dtype).removeprefix("torch."))
    return Memory(Contents(tensors=tensors, scalars=scalars, step=3), values), scalars


CASES = {"adamw, tied": (models.tied, models.adamw), "momentum": (models.blocks, models.momentum)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("workers", "stages"), [(1, 1), (2, 1), (3, 2), (4, 2), (2, 2)])
def test_any_layout_begins_with_the_same_bits(case: str, workers: int, stages: int) -> None:
    build, optimizer = CASES[case]
    source, scalars = trained(build, optimizer, 3, 2)
    owned: list[tuple[Shard, Scalars]] = []
    for number in range(workers):
        worker = Worker(build, optimizer)
        view = view_of(worker.model, workers, stages)
        source.elements = 0
        state = restored_state(number, worker.model, view, source, 2)
        assert state.step == 2
        for updater, shards in ((worker.optimizer.owned, state.owned), (worker.optimizer.kept, state.kept)):
            updater.bind(shards)
            for shard in shards:
                for name, values in updater.scalars(shard).items():
                    assert numbers({name: values}).get(name, {}) == scalars.get(name, {})
        owned += [(shard, worker.optimizer.owned.scalars(shard)) for shard in state.owned]
        for name in worker.model.frozen:
            here = worker.model.layer_of(name) in view.layout.layers_of(number)
            assert torch.equal(worker.model.parameter(name).reshape(-1), source.values[name, PARAM] if here else torch.empty(0))
        for layer in view.layout.layers_of(number):
            for parameter in worker.model.spec.layers[layer].parameters:
                assert torch.equal(worker.model.parameter(parameter.name).reshape(-1), source.values[parameter.name, PARAM])
        everything = sum(len(values) for values in source.values.values())
        assert source.elements <= everything + 2 * sum(len(v) for (n, s), v in source.values.items() if s == PARAM)
    spec = Worker(build, optimizer).model.spec
    found = given(spec, owned, {p.name: p.size for layer in spec.layers for p in layer.parameters})
    for key, values in found.items():
        assert torch.equal(values, source.values[key])


OPTIMIZERS: dict[str, Any] = {
    "NAdam": optim.NAdam,
    "ASGD": optim.ASGD,
    "RAdam": optim.RAdam,
    "AdamW amsgrad": lambda p: optim.AdamW(p, amsgrad=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": optim.Rprop,
    "Adafactor": optim.Adafactor,
    "Muon": lambda p: optim.Muon([each for each in p if each.ndim == 2]),
}


def layers_of_all_shapes() -> list[nn.Module]:
    odd = nn.Linear(8, 8)
    for name, shape in (("scalar", ()), ("one", (1,)), ("column", (8, 1)), ("nothing", (0, 4))):
        odd.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return [nn.Linear(8, 8), odd]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_state_comes_back_with_its_type_shape_and_bits(name: str) -> None:
    """And the next update has the same bits: NAdam's and ASGD's tensors came back as floats, and Adafactor's could not be saved."""

    def fresh() -> tuple[LayeredModel, ShardedOptimizer]:
        torch.manual_seed(3)
        layers = layers_of_all_shapes()
        trained = [p for layer in layers for p in layer.parameters() if name != "Muon" or (p.ndim == 2 and p.numel())]
        optimizer = OPTIMIZERS[name](trained)
        probed = probe(optimizer)
        model = LayeredModel(layers, cut=probed.cut)
        return model, ShardedOptimizer(optimizer, model, probed)

    def step(optimizer: ShardedOptimizer, model: LayeredModel, seed: int) -> None:
        gradients = {
            key: [torch.randn(b - a, generator=torch.Generator().manual_seed(seed)) for _, a, b in shard.parameters(model.spec)]
            for key, shard in optimizer.owned.shards.items()
        }
        optimizer.owned.step(gradients)

    model, optimizer = fresh()
    optimizer.owned.bind(initial_state(0, model, optimizer, view_of(model, 1, 1)).owned)
    for seed in range(3):
        step(optimizer, model, seed)
    before = [(shard, optimizer.owned.scalars(shard)) for shard in optimizer.owned.shards.values()]
    values = {(run.name, run.state): run.values.clone() for shard in before for run in runs(*shard, model.spec)}
    contents = contents_of(
        {p.name: p.shape for layer in model.spec.layers for p in layer.parameters},
        {**empty_states(model.spec), **states_of(before, model.spec)},
        scalars={each: found for _, scalars in before for each, found in numbers(scalars, model.spec.cut).items()},
        rest={},
        groups=[],
        frozen=(),
        buffers=frozenset(),
        step=3,
        extra={},
        files={},
    )
    for each, states in contents.tensors.items():
        values.update({(each, state): torch.empty(0) for state, spec in states.items() if 0 in spec.shape})
    again, restored = fresh()
    source = Memory(contents, values)
    restored.owned.bind(restored_state(0, again, view_of(again, 1, 1), source, 2, restored.probed.scalars).owned)
    for _ in range(2):
        for (key, shard), other in zip(optimizer.owned.shards.items(), restored.owned.shards.values(), strict=True):
            assert same(optimizer.owned.scalars(shard), restored.owned.scalars(other)), key
            assert same(shard.memory, other.memory)
        step(optimizer, model, 7)
        step(restored, again, 7)


def test_what_no_checkpoint_can_hold_is_refused_when_the_trainer_is_made() -> None:
    model = LayeredModel([nn.Linear(4, 4)])
    check_savable(model, {"step": torch.tensor(1.0), "k": 3, "flag": True}, 0)
    for value, kind in (([torch.ones(2)], "list"), (torch.ones(3), "Tensor")):
        with pytest.raises(TrainerError, match=f"keeps a {kind} as its state 'q', which cannot be in a checkpoint"):
            check_savable(model, {"q": value}, 0)
    check_savable(LayeredModel([nn.Linear(4, 4)], cut="tensor"), {"row": torch.ones(3)}, 0)
    for tensor, kind in ((torch.ones(3, dtype=torch.complex128), "complex128"),):
        layer = nn.Linear(4, 4)
        layer.register_buffer("table", tensor)
        with pytest.raises(TrainerError, match=f"0.table is {kind}, which cannot be in a checkpoint"):
            check_savable(LayeredModel([layer]), {}, 0)
        layer.register_buffer("table", tensor, persistent=False)
        check_savable(LayeredModel([layer]), {}, 0)


def test_what_is_not_of_this_model_is_refused() -> None:
    source, _ = trained(*CASES["momentum"], 1, 1)
    worker = Worker(*CASES["momentum"])
    view = view_of(worker.model, 1, 1)
    name, *_ = sorted(source.contents.tensors)
    tensors = dict(source.contents.tensors)

    def refused(changed: dict[str, Any]) -> str:
        with pytest.raises(CheckpointError) as caught:
            restored_state(0, worker.model, view, Memory(replace(source.contents, tensors=changed), source.values), 2)
        return str(caught.value)

    assert refused({k: v for k, v in tensors.items() if k != name}) == f"the checkpoint has no {name}, which the model has"
    assert "which the model does not have" in refused({**tensors, "stranger": tensors[name]})
    wrong = {**tensors[name], PARAM: replace(tensors[name][PARAM], dtype="bfloat16")}
    assert f"{name} is bfloat16" in refused({**tensors, name: wrong})
    wrong = {**tensors[name], PARAM: replace(tensors[name][PARAM], shape=(1, 2))}
    assert "(1, 2) in the checkpoint" in refused({**tensors, name: wrong})


def test_state_that_is_no_number_is_refused() -> None:
    parameter = ParameterSpec(name="w", shape=(4,), dtype="float32", start=0)
    spec = ModelSpec(layers=(LayerSpec(index=0, parameters=(parameter,)),))
    memory = {PARAM: torch.zeros(64), "exp_avg": torch.zeros(64, dtype=torch.bfloat16)}
    shard = Shard(layer=0, interval=Interval(start=0, stop=64, owner=0), memory=memory)
    with pytest.raises(CheckpointError, match="'row' of w is neither a number nor of the parameter's shape"):
        states_of([(shard, {"w": {"row": torch.zeros(3), "exp_avg": RUN}})], spec)
    assert states_of([(shard, {"w": {"step": torch.tensor(3.0), "exp_avg": RUN}})], spec) == {
        "w": {PARAM: "float32", "exp_avg": "bfloat16"}
    }


def test_numbers_are_read_from_small_tensors() -> None:
    assert numbers({"w": {"step": torch.tensor(3.0), "exp_avg": RUN, "k": 2}, "v": {"exp_avg": RUN}}) == {"w": {"step": 3.0, "k": 2}}
