"""Tests initial values that are computed later: each is what the function that builds the model says, whichever others are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import elastic
from elastic.engine.deferred.building import build, is_deferred, replace
from elastic.engine.initial import Computed
from elastic.engine.model import LayeredModel
from elastic.errors import TrainerError


class Odd(nn.Module):
    """Gives its tensors values in many ways, some of which torch skips on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.ones = nn.Parameter(torch.ones(5))
        self.constant = nn.Parameter(torch.tensor([0.25, 4.0]))
        self.truncated = nn.Linear(40, 30)
        nn.init.trunc_normal_(self.truncated.weight, std=0.02)
        self.orthogonal = nn.Linear(6, 9, bias=False)
        nn.init.orthogonal_(self.orthogonal.weight)
        self.sparse = nn.Linear(8, 10, bias=False)
        nn.init.sparse_(self.sparse.weight, 0.5)
        self.dirac = nn.Conv1d(3, 3, 3, bias=False)
        nn.init.dirac_(self.dirac.weight)
        self.tokens = nn.Embedding(7, 4, padding_idx=2)
        self.pieces = nn.Parameter(torch.empty(6))
        self.pieces.data[:3] = 1.0
        self.pieces.data[3:].fill_(2.0)
        self.scaled = nn.Parameter(torch.randn(64) * 0.1 + 3.0)
        self.recurrent = nn.LSTM(4, 4)
        self.register_buffer("mask", torch.tril(torch.ones(3, 3)).bool(), persistent=False)
        self.register_buffer("frequencies", 1.0 / (1000.0 ** (torch.arange(0, 8, 2).float() / 8)))
        self.normed = nn.BatchNorm1d(3)


def values(function: Callable[[], Any], seed: int = 1) -> dict[str, torch.Tensor]:
    built, recipe = build(function, seed)
    root = built if isinstance(built, nn.Module) else nn.ModuleList(built)
    replace(root, recipe.value)
    names = [name for name, _ in [*root.named_parameters(), *root.named_buffers()]]
    return {name: recipe.value(name) for name in names}


class Bytes(nn.Module):
    """Has what is not trained in every form: packed weights in a column, as 4-bit ones are, one element, and what cannot be moved."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(4, 4)
        self.codes = nn.Parameter((torch.arange(5000) % 251).to(torch.uint8).view(-1, 1), requires_grad=False)
        self.one = nn.Parameter(torch.tensor([[7.0]]), requires_grad=False)
        self.short = nn.Parameter(torch.arange(4, dtype=torch.int16), requires_grad=False)
        self.register_buffer("column", (torch.arange(5000) % 241).to(torch.uint8).view(-1, 1))
        self.register_buffer("row", (torch.arange(5000) % 239).to(torch.int8).view(1, -1))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("movable", [True, False])
def test_what_is_not_trained_has_its_values(exact: bool, movable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not movable:
        monkeypatch.setattr("elastic.engine.model._movable", lambda tensor: False)
    built, recipe = build(lambda: nn.Sequential(Bytes()), 1)
    replace(built, recipe.value)  # pyright: ignore[reportArgumentType]
    model, plain = LayeredModel(built, exact=exact, initial=Computed(recipe)), nn.Sequential(Bytes())
    model.hold([each.index for each in model.spec.layers])
    state = model.root.state_dict()
    for name, tensor in plain.state_dict().items():
        assert name.startswith("0.trained") or torch.equal(state[name], tensor), name
    assert model.is_placed("0.codes") is movable
    assert model.is_placed("0.column") is (movable and exact)  # without exactness, buffers may change
    model.watch.begin(0)


@pytest.mark.slow
def test_values_are_those_that_the_constructor_gives():
    found, plain = values(Odd), Odd()
    for name in ("ones", "constant", "pieces", "mask", "frequencies", "dirac.weight", "normed.running_var", "normed.num_batches_tracked"):
        assert torch.equal(found[name], plain.get_parameter(name) if name in dict(plain.named_parameters()) else plain.get_buffer(name))
    for name, parameter in plain.named_parameters():
        assert found[name].shape == parameter.shape
        assert found[name].dtype == parameter.dtype
    assert 0.015 < float(found["truncated.weight"].std()) < 0.025
    columns = found["orthogonal.weight"].T @ found["orthogonal.weight"]
    torch.testing.assert_close(columns, torch.eye(6), atol=1e-5, rtol=0)
    assert int((found["sparse.weight"] == 0).sum()) == 40
    assert not found["tokens.weight"][2].any()
    assert found["tokens.weight"][3].all()
    assert 2.9 < float(found["scaled"].mean()) < 3.1
    assert float(found["recurrent.weight_ih_l0"].abs().max()) <= 0.5


class OfNumPy(nn.Module):
    """Has tensors that are not made on torch's default device, and so have values when the model is built."""

    def __init__(self) -> None:
        super().__init__()
        table = np.cos(np.arange(12.0)).reshape(4, 3)
        self.trained = nn.Parameter(torch.from_numpy(table.T).float())  # not contiguous
        self.fixed = nn.Parameter(torch.from_numpy(table[1:]), requires_grad=False)
        self.drawn = nn.Parameter(torch.randn(3, device="cpu"))
        self.register_buffer("codes", torch.from_numpy((np.arange(6000) % 251).astype(np.uint8)))
        self.register_buffer("small", torch.from_numpy(table.copy()))


def test_tensors_that_have_values_when_the_model_is_built_keep_them() -> None:
    built, recipe = build(lambda: nn.Sequential(OfNumPy()), 1)
    given = {name: each.clone() for name, each in built.state_dict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    replace(built, recipe.value)  # pyright: ignore[reportArgumentType]
    model = LayeredModel(built, initial=Computed(recipe))
    assert {"0.trained", "0.fixed", "0.codes"} <= {name for name in given if model.is_placed(name)}
    model.hold([each.index for each in model.spec.layers])
    assert all(torch.equal(each, given[name]) for name, each in model.root.state_dict().items())
    again, other = build(lambda: nn.Sequential(OfNumPy()), 1)[1], build(lambda: nn.Sequential(OfNumPy()), 2)[1]
    assert recipe.digest("0.drawn") == again.digest("0.drawn") != other.digest("0.drawn")


class Scalar(nn.Module):
    """Has a trained number, as temperatures and gates are."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.fixed = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.25), requires_grad=False)


def test_a_parameter_without_dimensions_has_its_value() -> None:
    built, recipe = build(lambda: nn.Sequential(Scalar()), 1)
    replace(built, recipe.value)  # pyright: ignore[reportArgumentType]
    model = LayeredModel(built, initial=Computed(recipe))
    model.hold([each.index for each in model.spec.layers])
    assert {name: each.item() for name, each in model.root.state_dict().items()} == {"0.trained": 0.5, "0.fixed": 0.25}
    assert all(each.shape == () for each in model.root.state_dict().values())


def test_values_have_the_default_dtype_of_their_time() -> None:
    def double() -> nn.Module:
        torch.set_default_dtype(torch.float64)
        try:
            return nn.Linear(3, 3)
        finally:
            torch.set_default_dtype(torch.float32)

    assert {each.dtype for each in values(double).values()} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_a_value_depends_on_seed_layer_and_name_only():
    def linears(count: int) -> Callable[[], Any]:
        return lambda: [nn.Linear(9, 9) for _ in range(count)]

    three, two = values(linears(3)), values(linears(2))
    assert all(torch.equal(three[name], value) for name, value in two.items())
    assert not torch.equal(three["0.weight"], three["1.weight"])
    assert not torch.equal(three["0.weight"], values(linears(1), seed=2)["0.weight"])
    state = torch.get_rng_state()
    torch.manual_seed(5)
    _, recipe = build([lambda: nn.Linear(9, 9)] * 3, 1)
    torch.rand(3)
    before = torch.get_rng_state()
    assert torch.equal(recipe.value("2.weight"), three["2.weight"])
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(state)


def test_copies_of_a_module_begin_equal_as_in_torch():
    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)

    found = values(encoder)
    assert torch.equal(found["layers.0.linear1.weight"], found["layers.1.linear1.weight"])


def test_building_takes_no_memory_and_keeps_ties():
    def tied() -> list[nn.Module]:
        first, last = nn.Embedding(50_000, 4_000), nn.Linear(4_000, 50_000, bias=False)
        last.weight = first.weight
        return [first, nn.Linear(50_000, 50_000), last]

    built, recipe = build(tied, 0)
    assert isinstance(built, list)
    replace(nn.ModuleList(built), recipe.value)
    assert built[0].weight is built[2].weight
    parameters = list(nn.ModuleList(built).parameters())
    assert sum(parameter.untyped_storage().nbytes() for parameter in parameters) < 100
    assert built[1].weight.nbytes == 10_000_000_000
    torch.optim.AdamW(parameters, fused=True)  # it checks devices and dtypes


class Pretrained(nn.Module):
    """Initialises itself as models of transformers do: by a method, which the constructor skips on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(50, 50)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=3.0)
            nn.init.zeros_(module.bias)

    def initialize_weights(self) -> None:
        self.apply(self._init_weights)


def test_models_that_initialise_themselves_by_init_weights_are_initialised():
    found = values(lambda: [Pretrained().linear])
    assert 2.8 < float(found["0.weight"].std()) < 3.2
    assert not found["0.bias"].any()


def test_a_recipe_has_a_digest_of_what_values_follow_from():
    def scaled(std: float) -> Callable[[], nn.Module]:
        def one() -> nn.Module:
            layer = nn.Linear(3, 3)
            nn.init.normal_(layer.weight, std=std)
            return layer

        return one

    digests = [build(scaled(std), seed)[1].digest("weight") for std, seed in ((0.5, 1), (0.5, 1), (0.6, 1), (0.5, 2))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def _partly() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.extra = nn.Parameter(torch.empty(4))
    layer.extra.data[:2] = 1.0
    return layer


def _plain_tensor() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.__dict__["table"] = torch.ones(3)
    return layer


def _nested_tensor() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.__dict__["tables"] = {"first": [torch.ones(3)]}
    return layer


def _held_twice() -> nn.Module:
    layer = nn.Linear(3, 3, device="cpu")
    layer.__dict__["also"] = [layer.weight]
    return layer


def _own_generator() -> nn.Module:
    layer = nn.Linear(3, 3)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    return layer


def _shares() -> nn.Module:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = nn.Parameter(one.weight.t())
    return nn.Sequential(one, other)


def _cut() -> nn.Module:
    return elastic.layers(nn.Sequential(nn.ModuleList([nn.Linear(3, 3)])), torch.ones(1, 3))


REFUSED: dict[str, tuple[Any, str]] = {
    "no value": (lambda: nn.ParameterList([torch.empty(3)]), "nothing gives 0 of layer 0 its initial value.* weights="),
    "a part": (_partly, "nothing gives extra of layer 0 its initial value, or not all of its elements"),
    "depends on values": (lambda: nn.Linear(3, int(torch.ones(1).item())), "builds the model fails on torch's meta device.*item"),
    "raises": ([lambda: nn.Linear(1, 1), lambda: nn.Linear(3)], "builds layer 1 fails on torch's meta device.*out_features"),
    "no module": (lambda: 3, "returned a int; it must return an nn.Module, or a list of them"),
    "plain tensor": (_plain_tensor, "attribute 'table' of the model .Linear. is a tensor that is neither a parameter nor a buffer"),
    "nested tensor": (_nested_tensor, "attribute 'tables' of the model .Linear. is a tensor that is neither a parameter nor a buffer"),
    "held twice": (_held_twice, "attribute 'also' of the model .Linear. is a tensor that is neither a parameter nor a buffer"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "parameter 0.weight has no shape yet.* use the module that is not lazy"),
    "own generator": (_own_generator, "draws with a torch.Generator of its own"),
    "cut on meta": (_cut, "elastic.layers.Sequential. needs a model with values, but this one is on meta.* return the model itself"),
    "shared memory": (_shares, "0.weight and 1.weight share memory but are not one object"),
}


@pytest.mark.parametrize("function", REFUSED)
def test_what_cannot_be_computed_later_is_refused_with_its_name(function: str):
    given, message = REFUSED[function]
    with pytest.raises(TrainerError, match=message):
        values(given)


def test_modules_and_functions_are_told_apart():
    assert not is_deferred(nn.Linear(1, 1))
    assert not is_deferred([nn.Linear(1, 1)])
    assert is_deferred(Odd)
    assert is_deferred([Odd, Odd])
    with pytest.raises(TrainerError, match="layer 0 is a module, and layer 1 is not"):
        is_deferred([nn.Linear(1, 1), Odd])
