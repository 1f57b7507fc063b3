"""Tests optimizers that number their parameters: each moment stays with its parameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

from elastic.checkpoint.convert.rules import parse_rules
from elastic.checkpoint.convert.run import Conversion, convert, open_any
from elastic.errors import CheckpointError

Given = Callable[[nn.Module], Iterable[nn.Parameter]]


def towers(width: int = 4) -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Linear(4, width), "decoder": nn.Linear(width, 4)})


def backwards(model: nn.Module) -> list[nn.Parameter]:
    return list(reversed(list(model.parameters())))


def decoder_first(model: nn.Module) -> Iterable[nn.Parameter]:
    return itertools.chain(model["decoder"].parameters(), model["encoder"].parameters())  # pyright: ignore[reportIndexIssue]


def in_order(model: nn.Module) -> Iterable[nn.Parameter]:
    return model.parameters()


def encoder(model: nn.Module) -> Iterable[nn.Parameter]:
    return model["encoder"].parameters()  # pyright: ignore[reportIndexIssue]


def save(path: Path, model: nn.Module, given: Iterable[nn.Parameter], **options: bool) -> dict[str, torch.Tensor]:
    """Saves model and Adam after a step; the first moments by name."""
    optimizer = torch.optim.Adam(given, **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}, path)
    return {name: optimizer.state[p]["exp_avg"] for name, p in model.named_parameters() if p in optimizer.state}


def moments(source: Path, rules: dict | None = None) -> dict[str, torch.Tensor]:
    """The first moments by name, as they are read."""
    _, opened = open_any(source, rules=parse_rules(rules or {}))
    try:
        specs = {name: states["exp_avg"] for name, states in opened.contents.tensors.items() if "exp_avg" in states}
        return {name: opened.read(name, "exp_avg", 0, spec.elements).reshape(spec.shape) for name, spec in specs.items()}
    finally:
        opened.close()


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("given", "to"), [(in_order, "elastic"), (decoder_first, "dcp"), (backwards, "torch")])
def test_equal_shapes_take_a_rule_whatever_the_order(tmp_path: Path, given: Given, to: str) -> None:
    model = towers()
    expected = save(tmp_path / "a.pt", model, given(model))
    with pytest.raises(CheckpointError, match=r"State the names by a rule: \[optimizer\] names = "):
        convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to=to))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rules = {"optimizer": {"names": [[names[id(parameter)] for parameter in given(model)]]}}
    convert(Conversion(source=tmp_path / "a.pt", target=tmp_path / "b", to=to, rules=parse_rules(rules)))
    check(moments(tmp_path / "b"), expected)


def test_a_rule_may_state_the_order_of_definition(tmp_path: Path) -> None:
    model = towers()
    expected = save(tmp_path / "a.pt", model, in_order(model))
    check(moments(tmp_path / "a.pt", {"optimizer": {"groups": [".*"]}}), expected)


@pytest.mark.parametrize(("given", "proved"), [(in_order, True), (decoder_first, False), (backwards, False), (encoder, True)])
def test_shapes_that_occur_once_are_a_proof(tmp_path: Path, given: Given, proved: bool) -> None:
    """Of all parameters or of those of one module; never of another order than that of definition, which is not searched for."""
    model = towers(width=6)
    expected = save(tmp_path / "a.pt", model, given(model))
    if proved:
        check(moments(tmp_path / "a.pt"), expected)
    else:
        with pytest.raises(CheckpointError, match="by a rule"):
            moments(tmp_path / "a.pt")


def test_one_parameter_of_an_unnamed_module_is_no_proof(tmp_path: Path) -> None:
    """A parameter that is not in the model may have the shape of one that is."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(2, 5, bias=False)})
    foreign = nn.Parameter(torch.randn(2, 3))
    foreign.grad = torch.ones(2, 3)
    optimizer = torch.optim.Adam([foreign])
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="by a rule"):
        moments(tmp_path / "a.pt")


def test_a_parameter_without_state_is_no_obstacle_and_no_gap(tmp_path: Path) -> None:
    model = towers(width=6)
    model["decoder"].bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    check(moments(tmp_path / "a.pt"), {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters() if p.requires_grad})


def test_without_states_any_order_is_the_same(tmp_path: Path) -> None:
    model = towers()
    torch.save({"model": model.state_dict(), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1).state_dict()}, tmp_path / "a.pt")
    assert moments(tmp_path / "a.pt") == {}


def test_names_in_the_groups_are_believed(tmp_path: Path) -> None:
    model = towers()
    named = list(model.named_parameters())[::-1]
    expected = save(tmp_path / "a.pt", model, named)  # pyright: ignore[reportArgumentType]
    check(moments(tmp_path / "a.pt"), expected)


def test_states_without_the_parameter_s_shape_prove_nothing(tmp_path: Path) -> None:
    model = towers(width=6)
    optimizer = torch.optim.Adafactor(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="by a rule"):
        moments(tmp_path / "a.pt")
