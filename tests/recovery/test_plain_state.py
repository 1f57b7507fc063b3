"""Tests the conversion of optimizer and scheduler state to JSON and back."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from elastic.worker.plain_state import Left, capture, from_plain, revive, to_plain
from tests import dynamo  # noqa: F401


def there_and_back(value: Any) -> Any:
    return from_plain(json.loads(json.dumps(to_plain(value))))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=6) | st.integers() | st.sampled_from(["tensor", "tuple", "dict"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(VALUES)
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    found = there_and_back(value)
    assert found == value
    assert repr(found) == repr(value), "also the types: tuples, integers as keys, negative zeros"


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.tensor(7, dtype=torch.int64),
        torch.tensor([0.1, -0.0, 1e-45, 3.4e38]),
        torch.tensor([[0.1, 1 / 3]], dtype=torch.float64),
        torch.tensor([1.5, 2.0**-133]).bfloat16(),
        torch.tensor([True, False]),
        torch.empty(0, 3),
        torch.arange(6).view(2, 3).t(),
    ],
)
def test_tensors_come_back_with_their_bits(tensor: torch.Tensor) -> None:
    found = there_and_back({"state": [tensor]})["state"][0]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor)
    assert torch.equal(torch.signbit(found), torch.signbit(tensor))


def test_what_is_not_finite_comes_back_too() -> None:
    assert there_and_back([math.inf, -math.inf]) == [math.inf, -math.inf]
    assert math.isnan(there_and_back(math.nan))
    assert torch.isnan(there_and_back(torch.tensor(math.nan)))


@pytest.mark.parametrize(
    "value",
    [
        np.float32(0.1),
        np.float64(0.1),
        np.int64(3),
        np.bool_(True),
        Counter({3: 2}),
        OrderedDict(b=1, a=2),
        defaultdict(list, {"a": [1]}),
        defaultdict(None, {}),
        deque([1, 2.5], maxlen=3),
        torch.float32,
        torch.device("cpu"),
    ],
)
def test_other_types_come_back_as_they_were(value: Any) -> None:
    found = there_and_back([value])[0]
    assert type(found) is type(value)
    assert found == value
    assert getattr(found, "default_factory", None) is getattr(value, "default_factory", None)
    assert getattr(found, "maxlen", None) == getattr(value, "maxlen", None)


def test_arrays_come_back_as_they_were() -> None:
    value = np.arange(6, dtype=np.int16).reshape(2, 3)
    found = there_and_back(value)
    assert found.dtype == value.dtype
    assert np.array_equal(found, value)


def test_functions_stay_with_whoever_has_them() -> None:
    live = {"rule": abs, "list": [print, 1], "kept": 3}
    captured = capture({"rule": len, "list": [max, 2], "kept": 4, "gone": min})
    assert captured["rule"] == Left("builtin_function_or_method")
    assert revive(there_and_back(captured), live) == {"rule": abs, "list": [print, 2], "kept": 4}


@pytest.mark.parametrize("value", [abs, object(), {1, 2}, b"raw", [1, {"a": print}], 1j])
def test_what_cannot_travel_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="has no JSON form"):
        to_plain(value)


def test_a_dict_by_other_keys_cannot_travel() -> None:
    with pytest.raises(TypeError, match=r"a dict with keys \[\(1, 2\)\] has no JSON form"):
        to_plain({(1, 2): 3})


class Rule:
    """A callable object, whose attributes are a state."""

    def __init__(self) -> None:
        self.factor = 0.5

    def __call__(self, epoch: int) -> float:
        return self.factor**epoch


SCHEDULERS: dict[str, Any] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "one cycle, tensors": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1], total_steps=20, cycle_momentum=False),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "cyclic, a function": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, scale_fn=lambda x: 0.9**x),
    "a function": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "an object": lambda o: lr_scheduler.LambdaLR(o, Rule()),
    "multiplied": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "averaged": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one after the other": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "together": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 7),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_from_what_came_back(name: str) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
        found = []
        for step in range(steps):
            optimizer.step()
            schedule.step(*([float(step % 2)] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    one, other = fresh(), fresh()
    rates(*one, 3)
    other[1].load_state_dict(revive(there_and_back(capture(one[1].state_dict())), other[1].state_dict()))
    for before, after in zip(one[0].param_groups, other[0].param_groups, strict=True):
        after.update(there_and_back({name: value for name, value in before.items() if name != "params"}))
    assert rates(*one, 6) == rates(*other, 6)
