"""Tests that a joiner runs each kind of layer once before it joins, and that nothing is changed by it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from elastic.engine.model import LayeredModel
from elastic.engine.numerics import Numerics
from elastic.engine.warm_up import warm_up


class Kind(nn.Module):
    """Counts what runs, draws from all generators, and keeps a cache."""

    ran: list[tuple[str, int]]

    def __init__(self, number: int, size: int = 8) -> None:
        super().__init__()
        self.number, self.linear, self.norm = number, nn.Linear(8, size), nn.BatchNorm1d(size)
        self.register_buffer("cache", None, persistent=False)
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ran.append(("forward", self.number))
        x.requires_grad and x.register_hook(lambda gradient: self.ran.append(("backward", self.number)))
        self.calls += 1
        self.cache = torch.ones(3)
        return nn.functional.dropout(self.norm(self.linear(x))) * (1 + random.random() + np.random.rand())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    monkeypatch.setattr(Kind, "ran", found, raising=False)
    return found


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.mse_loss(output, batch[1])


def state_of(model: LayeredModel) -> Any:
    tensors = [*model.root.named_parameters(), *model.root.named_buffers()]
    found = [(name, id(each), each.tolist(), getattr(each, "grad", None) is None) for name, each in tensors]
    versions = [(name, each._version) for name, each in tensors if "calls" not in name]
    drawn = torch.default_generator.get_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # pyright: ignore[reportIndexIssue]
    return found, versions, drawn, dict(model.running.statistics.of(range(9), range(9)))


@pytest.mark.parametrize("checkpoint", [lambda index, layer: False, lambda index, layer: True])
def test_one_layer_of_each_kind_runs_and_nothing_changes(ran: list[tuple[str, int]], checkpoint: Any) -> None:
    layers = [nn.Linear(5, 8), Kind(1), Kind(2), Kind(3), Kind(4, 3)]
    model = LayeredModel(layers, exact=False)
    model.running.statistics.watch()
    numerics = Numerics(seed=3, autocast=None, checkpoint=checkpoint)
    before = state_of(model)
    warm_up(model, loss, numerics, lambda: (torch.randn(4, 5), torch.randn(4, 3)))
    assert {number for _, number in ran} == {1, 4}
    assert [number for did, number in ran if did == "backward"] == [1, 4]
    assert state_of(model) == before


def test_an_error_of_the_users_ends_it_and_nothing_changes(ran: list[tuple[str, int]]) -> None:
    model = LayeredModel([Kind(1), Kind(2, 3), nn.Linear(9, 9)], exact=False)
    model.running.statistics.watch()
    before = state_of(model)
    warm_up(model, loss, Numerics(seed=3), lambda: (torch.randn(4, 8), torch.randn(4, 3)))
    assert ran
    assert state_of(model) == before
    ran.clear()
    warm_up(model, loss, Numerics(seed=3), lambda: 1 / 0)
    assert not ran
    assert state_of(model) == before
