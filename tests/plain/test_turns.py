"""Tests how the two greenlets of a plain loop take turns."""

from __future__ import annotations

import contextvars
from typing import Any

import pytest
import torch

from elastic.worker.plain.turns import Ended, Turns, Work

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("NAME", default="")


def work(number: int) -> Work:
    return Work(step=0, micro_batch=number, contents=None, states=None)


def modes() -> tuple[Any, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def test_they_take_turns_until_the_engine_ends() -> None:
    turns, got = Turns(), []

    def run() -> None:
        got.extend(turns.to_user(work(number)) for number in range(2))

    assert turns.begin(run) == work(0)
    assert turns.to_engine("a") == work(1)
    assert not turns.in_engine
    assert turns.to_engine("b") == Ended()
    assert got == ["a", "b"]


def test_each_keeps_its_modes() -> None:
    turns, seen = Turns(), []

    def run() -> None:
        torch.set_grad_enabled(True)
        seen.append(modes())
        with torch.no_grad():
            turns.to_user(work(0))
            seen.append(modes())

    plain = modes()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        own = modes()
        turns.begin(run)
        assert modes() == own
        with torch.enable_grad():
            turns.to_engine(None)
            assert torch.is_grad_enabled()
        assert modes() == own
    assert modes() == plain
    assert [grad for grad, _, _ in seen] == [True, False]
    assert not any(autocast for _, autocast, _ in seen)


def test_a_cast_of_parameters_is_not_kept_beyond_the_engines_turn() -> None:
    turns = Turns()
    weight = torch.nn.Parameter(torch.ones(4, 4))

    def run() -> None:
        weight.data.mul_(2.0)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = (torch.ones(4, 4) @ weight).sum().item()
        turns.begin(run)
        assert (torch.ones(4, 4) @ weight).sum().item() == 2 * first


def test_an_error_of_the_engine_arrives_in_the_loop() -> None:
    turns = Turns()

    def run() -> None:
        turns.to_user(work(0))
        raise ValueError("lost")

    turns.begin(run)
    with pytest.raises(ValueError, match="lost"):
        turns.to_engine(None)


def test_an_engine_that_is_left_cleans_up() -> None:
    turns, ended = Turns(), []

    def run() -> None:
        try:
            turns.to_user(work(0))
        finally:
            ended.append(True)

    turns.begin(run)
    turns.leave()
    assert ended == [True]


def test_context_variables_reach_the_engine() -> None:
    turns, seen = Turns(), []
    NAME.set("loop")
    turns.begin(lambda: seen.append(NAME.get()))
    assert seen == ["loop"]
