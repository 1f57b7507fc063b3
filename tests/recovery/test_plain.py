"""What an optimizer or a scheduler remembers, as JSON and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic.recovery.plain import from_plain, to_plain
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


@pytest.mark.parametrize("value", [abs, object(), {1, 2}, b"raw", [1, {"a": print}], 1j])
def test_what_cannot_travel_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot travel"):
        to_plain(value)


def test_a_dict_by_other_keys_cannot_travel() -> None:
    with pytest.raises(TypeError, match=r"a dict with keys \[\(1, 2\)\] cannot travel"):
        to_plain({(1, 2): 3})


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3]),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    ],
)
def test_a_scheduler_goes_on_from_what_came_back(scheduler: Any) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
        return optimizer, scheduler(optimizer)

    def rates(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> list[float]:
        found = []
        for step in range(steps):
            optimizer.step()
            schedule.step(*([float(step % 2)] if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    one, other = fresh(), fresh()
    rates(*one, 3)
    other[1].load_state_dict(there_and_back(one[1].state_dict()))
    for before, after in zip(one[0].param_groups, other[0].param_groups, strict=True):
        after.update(there_and_back({name: value for name, value in before.items() if name != "params"}))
    assert rates(*one, 6) == rates(*other, 6)
