"""Tests the probe on common kinds of optimizers: which are cut, which keep whole tensors, which are refused and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from elastic.engine.probe import probe
from elastic.errors import TrainerError
from elastic.layout.regions import BLOCK


class Sgd(optim.Optimizer):
    """The optimizer that the other ones of this module modify."""

    def __init__(self, params: Any, lr: Any = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})

    @torch.no_grad()
    def step(self) -> None:
        self.begin()
        for group in self.param_groups:
            self.group(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(self.update(parameter, group), alpha=float(group["lr"]))

    def begin(self) -> None: ...
    def group(self, group: dict[str, Any]) -> None: ...

    def update(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        return parameter.grad


class Lars(Sgd):
    def update(self, parameter, group):
        return parameter.grad * (0.02 * parameter.norm() / parameter.grad.norm() if group["adapt"] else 1.0)


class Prodigy(Sgd):
    """A common step size from inner products over all parameters of a group; only the estimate is made here, not used at once."""

    def group(self, group):
        for parameter in group["params"]:
            if parameter.grad is not None:
                start = self.state[parameter].setdefault("x0", parameter.detach().clone())
                group["r"] += float((parameter.grad * (start - parameter)).double().sum())

    def update(self, parameter, group):
        return parameter.grad * (1.0 if group["r"] < 1e9 else 2.0)


class OverAllGroups(Sgd):
    """The step size is one of all groups together."""

    def begin(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.param_groups[0]["d"] = float(sum(g.double().abs().sum() for g in gradients))


class ScheduleFree(Sgd):
    """Counts its own steps in its groups, as many do: that is equal on all owners, and travels with the groups' settings."""

    def group(self, group):
        group["k"] += 1


class Factored(Sgd):
    """Treats large matrices as a whole."""

    def update(self, parameter, group):
        factored = parameter.ndim == 2 and min(parameter.shape) >= 128
        return parameter.grad / parameter.grad.norm() if factored else parameter.grad


class NoDecayOfVectors(Sgd):
    def update(self, parameter, group):
        return parameter.grad + (parameter if parameter.ndim > 1 else 0.0)


class OnlyOf(Sgd):
    def update(self, parameter, group):
        assert parameter.ndim == group["ndim"]
        return parameter.grad


class ByName(Sgd):
    """Knows something of each parameter by the parameter itself."""

    def update(self, parameter, group):
        return parameter.grad * self.known[id(parameter)]

    def __init__(self, params):
        super().__init__(params)
        self.known = {id(p): 1.0 for group in self.param_groups for p in group["params"]}


class GlobalState(Sgd):
    def begin(self):
        self.state["clock"] = {"step": 1}


class Counts(Sgd):
    def __init__(self, params):
        super().__init__(params)
        self.clock, self.average = 0, torch.zeros(1)

    def begin(self):
        self.clock += 1
        self.average += 1


class NeedsTwo(Sgd):
    """Fails where a worker owns nothing of a group."""

    def group(self, group):
        _ = group["params"][0]


class Noise(Sgd):
    def update(self, parameter, group):
        return parameter.grad + torch.randn_like(parameter)


class PythonNoise(Sgd):
    def update(self, parameter, group):
        return parameter.grad + float(np.random.rand())


class Nothing(Sgd):
    def update(self, parameter, group):
        return torch.zeros_like(parameter)


class Lookahead(Sgd):
    def __init__(self, base: optim.Optimizer) -> None:
        super().__init__([p for group in base.param_groups for p in group["params"]])
        self.base = base


class Fickle(Sgd):
    made = 0

    def update(self, parameter, group):
        Fickle.made += 1
        return parameter.grad * Fickle.made


class NotInTrainMode(Sgd):
    def begin(self):
        raise Exception("not in train mode when step is called")


def vector(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (700,)))


def matrix(rows: int = 200, columns: int = 300) -> nn.Parameter:
    return nn.Parameter(torch.ones(rows, columns))


def groups(*settings: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": [matrix() if number % 2 else vector()], **each} for number, each in enumerate(settings)]


CUTS: dict[str, tuple[Callable[[], optim.Optimizer], str]] = {
    "no group adapts": (lambda: Lars(groups({"adapt": False}, {"adapt": False})), "block"),
    "the last group adapts": (lambda: Lars(groups({"adapt": False}, {"adapt": True})), "tensor"),
    "the first group adapts": (lambda: Lars(groups({"adapt": True}, {"adapt": False})), "tensor"),
    "a warm-up begins with a rate of 0": (lambda: Lars([matrix()], lr=0.0, adapt=True), "tensor"),
    "also as a tensor": (lambda: Lars([matrix()], lr=torch.tensor(0.0), adapt=True), "tensor"),
    "it counts its steps in its groups": (lambda: ScheduleFree([matrix()], k=0), "block"),
    "large matrices are another thing": (lambda: Factored([matrix(3, BLOCK), matrix(129, 140)]), "tensor"),
    "small ones are not": (lambda: Factored([matrix(100, 5000)]), "block"),
    "vectors are another thing": (lambda: NoDecayOfVectors([vector(), matrix()]), "tensor"),
    "matrices only": (lambda: OnlyOf([matrix()], ndim=2), "tensor"),
    "convolutions only": (lambda: OnlyOf([nn.Parameter(torch.ones(64, 32, 3, 3))], ndim=4), "tensor"),
    "vectors only": (lambda: OnlyOf([vector()], ndim=1), "block"),
    "a first parameter of one element": (lambda: optim.Adagrad([vector(1), matrix()]), "block"),
    "a scalar": (lambda: optim.Adagrad([nn.Parameter(torch.tensor(1.0)), matrix()]), "block"),
    "a scalar's AdamW": (lambda: optim.AdamW([nn.Parameter(torch.tensor(1.0)), matrix()]), "block"),
    "nothing in it": (lambda: optim.AdamW([nn.Parameter(torch.ones(0, 4)), matrix()]), "block"),
    "several dtypes": (lambda: optim.Adagrad([nn.Parameter(torch.ones(9).bfloat16()), nn.Parameter(torch.ones(40, 90).double())]), "block"),
    "frozen": (lambda: optim.AdamW([nn.Parameter(torch.ones(3), requires_grad=False), matrix()]), "block"),
    "names": (lambda: optim.AdamW([("a", matrix()), ("b", vector())]), "block"),
    "Adafactor": (lambda: optim.Adafactor([vector(), matrix()]), "tensor"),
}


@pytest.mark.parametrize("what", CUTS)
def test_tensors_are_kept_whole_where_pieces_would_come_out_otherwise(what: str) -> None:
    make, cut = CUTS[what]
    assert probe(make()).cut == cut


REFUSED: dict[str, tuple[Callable[[], optim.Optimizer], str]] = {
    "an estimate over a group": (lambda: Prodigy([matrix(), vector()], r=0.0), r"Prodigy is not elementwise.*'r' of group 0 becomes"),
    "an estimate over one tensor": (lambda: Prodigy([matrix()], r=0.0), r"Prodigy is not elementwise.*'r' of group 0 becomes"),
    "an estimate over groups": (lambda: OverAllGroups(groups({}, {}), d=0.0), r"OverAllGroups is not elementwise.*'d' of group 0 becomes"),
    "parameters known by themselves": (
        lambda: ByName([matrix()]),
        r"ByName.step\(\) fails.* \(KeyError: .*nothing about them",
    ),
    "a state of no parameter": (lambda: GlobalState([matrix()]), "GlobalState keeps state 'clock' that belongs to no parameter"),
    "attributes": (lambda: Counts([matrix()]), "Counts has an attribute 'clock' that changes from step to step"),
    "no empty group": (lambda: NeedsTwo(groups({}, {"lr": 0.2})), r"fails where a worker owns 1 of the parameters.*IndexError"),
    "noise": (lambda: Noise([matrix()]), r"Noise.step\(\) draws random numbers"),
    "NumPy's noise": (lambda: PythonNoise([matrix()]), r"PythonNoise.step\(\) draws random numbers"),
    "nothing happens": (lambda: Nothing([matrix()]), r"Nothing.step\(\) changed nothing"),
    "an optimizer around another": (lambda: Lookahead(Sgd([matrix()])), r"Lookahead wraps another optimizer \(base: Sgd\)"),
    "other bits each time": (lambda: Fickle([matrix()]), r"Fickle.step\(\) does not give the same bits twice"),
    "any exception": (lambda: NotInTrainMode([matrix()]), r"fails.*\(Exception: not in train mode when step is called\)"),
    "the first dtype's epsilon": (
        lambda: optim.Adafactor([matrix(), matrix().bfloat16().detach().requires_grad_()]),
        r"Adafactor updates parameters of one dtype by those of another .*group 0 has float32, bfloat16; .*a group of its own, or settings",
    ),
    "a closure": (lambda: optim.LBFGS([matrix()]), r"cannot be called without arguments \(it requires closure\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_spread_is_refused_with_the_reason(what: str) -> None:
    make, reason = REFUSED[what]
    with pytest.raises(TrainerError, match=reason):
        probe(make())


def test_a_state_of_no_parameter_that_is_there_from_the_beginning_is_refused() -> None:
    optimizer = Sgd([matrix()])
    optimizer.state["global"] = {"d": 1.0}
    with pytest.raises(TrainerError, match="Sgd keeps state 'global' that belongs to no parameter"):
        probe(optimizer)


def test_the_probe_leaves_everything_as_it_was() -> None:
    optimizer = Counts([matrix()])
    rate = torch.tensor(0.0)
    other = optim.Adagrad([{"params": [matrix()], "lr": rate}], initial_accumulator_value=0.3)
    before = torch.get_rng_state(), {name: value.clone() for name, value in other.state[other.param_groups[0]["params"][0]].items()}
    with pytest.raises(TrainerError):
        probe(optimizer)
    probe(other)
    assert (optimizer.clock, float(optimizer.average), float(rate)) == (0, 0.0, 0.0)
    assert torch.equal(torch.get_rng_state(), before[0])
    (parameter,) = other.param_groups[0]["params"]
    assert {name: bool((value == before[1][name]).all()) for name, value in other.state[parameter].items()} == {"step": True, "sum": True}
    assert bool((parameter == 1).all())
    assert parameter.grad is None


def test_an_optimizer_that_writes_to_its_gradients_is_found_out() -> None:
    class Writes(Sgd):
        def update(self, parameter, group):
            return parameter.grad.add_(parameter)

    assert probe(Writes([matrix()])).writes_gradients
    assert not probe(Sgd([matrix()])).writes_gradients


def test_many_groups_that_differ_by_amounts_are_one_kind() -> None:
    """A rate for each layer, as in fine-tuning: the probe takes no longer for it."""

    class Counted(Sgd):
        updates = 0

        def update(self, parameter, group):
            Counted.updates += 1
            return parameter.grad

    counts = []
    for count in (2, 200):
        Counted.updates = 0
        probe(Counted([{"params": [matrix() if i % 2 else vector()], "lr": 0.1 / (i + 1), "name": f"layer {i}"} for i in range(count)]))
        counts.append(Counted.updates)
    assert counts[0] == counts[1]
