"""Tests that backwards are heard of, with the value whose gradient they compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from elastic.worker.plain import backwards


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    monkeypatch.setattr(torch.autograd, "backward", backwards._original)
    found: list[float] = []
    backwards.hear(lambda: True, lambda value: found.append(value.item()))
    return found


def x() -> torch.Tensor:
    return torch.tensor([1.0, 2.0], requires_grad=True)


def test_a_loss_is_heard_of_when_its_backward_has_returned(heard: list[float]) -> None:
    leaf = x()
    (leaf * leaf).sum().backward()
    assert heard == [5.0]
    assert leaf.grad is not None


def test_tensors_count_with_the_gradients_that_are_given(heard: list[float]) -> None:
    leaf = x()
    (2 * leaf).backward(torch.tensor([1.0, 10.0]))
    torch.autograd.backward([leaf.sum(), (3 * leaf).sum()], [torch.tensor(1.0), torch.tensor(2.0)])
    assert heard == [42.0, 21.0]


def test_a_backward_inside_of_another_is_a_part_of_it(heard: list[float]) -> None:
    leaf = x()
    out = checkpoint(lambda value: value * value, leaf, use_reentrant=True)
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    assert heard == [5.0]


def test_one_that_fails_is_not_heard_of(heard: list[float]) -> None:
    with pytest.raises(RuntimeError):
        torch.tensor(1.0).backward()
    x().sum().backward()
    assert heard == [3.0]


def test_gradients_by_autograd_grad_are_none(heard: list[float]) -> None:
    torch.autograd.grad(x().sum(), x(), allow_unused=True)
    assert heard == []
