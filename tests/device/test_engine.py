"""Tests that training on a device has the same bits on every layout, as on the CPU."""

from __future__ import annotations

import json

import pytest

from tests.device.processes import python

CASES = [
    "tied thrice",
    "two groups, clipping, scheduler",
    "momentum",
    "fused",
    "whole tensors",
    "bf16 autocast",
    "bf16 parameters",
    "checkpointing in-place",
    "transposed view",
    "dict across",
    "unused and frozen",
    "weighted loss",
    "grains of two",
    "built by a function",
]


def check(names: list[str], *layouts: str) -> None:
    done = python("from tests.device.trainings import main; main()", ";".join(names), " ".join(layouts))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == dict.fromkeys(names, True)


@pytest.mark.slow
def test_layouts_have_the_same_bits() -> None:
    check(["dropout"], "2x2")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("layouts", [("2x1", "4x2"), ("3x3",)])
@pytest.mark.parametrize("names", [CASES[:4], CASES[4:8], CASES[8:]])
def test_every_kind_of_training_has_the_same_bits_on_every_layout(names: list[str], layouts: tuple[str, ...]) -> None:
    check(names, *layouts)
