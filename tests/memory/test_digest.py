"""Tests that the digest detects every change of content, place and length that a broken copy may have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.memory.digest import digest

SIZES = [1, 3, 4, 5, 7, 8, 9, 12, 8191, 8192, 8193, 8196, 16384, 40000]


def memory(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_equal_memory_has_equal_digests_wherever_it_lies(size: int) -> None:
    values = memory(size)
    shifted = np.empty(size + 1, dtype=np.uint8)[1:]
    shifted[:] = values
    assert digest(values) == digest(values.copy()) == digest(shifted)
    assert len(digest(values)) == 32


@given(st.sampled_from(SIZES), st.data())
def test_one_changed_bit_is_found(size: int, data: st.DataObject) -> None:
    values = memory(size)
    before = digest(values)
    values[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(values) != before


@given(st.data())
def test_flipped_signs_of_two_elements_are_found(data: st.DataObject) -> None:
    values = np.random.default_rng(1).standard_normal(5000).astype(np.float32)
    before = digest(values)
    for place in data.draw(st.lists(st.integers(0, 4999), min_size=2, max_size=2, unique=True)):
        values[place] *= -1
    assert digest(values) != before


@given(st.data())
def test_swapped_blocks_are_found(data: st.DataObject) -> None:
    values = np.random.default_rng(2).standard_normal((12, 4096)).astype(np.float32)
    before = digest(values)
    one, other = data.draw(st.lists(st.integers(0, 11), min_size=2, max_size=2, unique=True))
    values[[one, other]] = values[[other, one]]
    assert digest(values) != before


@pytest.mark.parametrize(
    "change", [lambda v: np.roll(v, 1), lambda v: v[:-1], lambda v: np.append(v, v[:0].sum()), lambda v: v[::-1].copy()]
)
def test_shifts_and_lengths_are_found(change) -> None:
    values = np.random.default_rng(3).standard_normal(9000).astype(np.float32)
    assert digest(change(values).astype(np.float32)) != digest(values)


def test_zeros_of_different_lengths_differ() -> None:
    assert len({digest(np.zeros(size, dtype=np.uint8)) for size in [0, *SIZES]}) == len(SIZES) + 1


def test_a_tensor_is_digested_as_its_memory() -> None:
    tensor = torch.randn(100, 7)
    assert digest(tensor) == digest(tensor.numpy()) == digest(tensor.to(torch.float32).view(700))
    assert digest(tensor.to(torch.bfloat16)) != digest(tensor)
