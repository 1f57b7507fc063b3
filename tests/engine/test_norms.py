from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.engine.norms import block_sums, clip_factor, norm
from elastic.layout.regions import BLOCK


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_block_sums_do_not_depend_on_where_an_interval_is_cut(cuts: list[int], seed: int, dtype: torch.dtype) -> None:
    values = torch.randn(5 * BLOCK + 700, generator=torch.Generator().manual_seed(seed)).to(dtype)
    edges = [0, *sorted(cut * BLOCK for cut in cuts), values.numel()]
    parts = [block_sums(values[a:b]) for a, b in itertools.pairwise(edges) if a < b]
    assert torch.equal(torch.cat(parts), block_sums(values))


def test_many_rows_give_the_same_sums_as_single_ones() -> None:
    values = torch.randn(200 * BLOCK)
    singles = torch.cat([block_sums(row) for row in values.split(BLOCK)])
    assert torch.equal(block_sums(values), singles)


def test_the_norm_is_right_and_independent_of_order() -> None:
    values = torch.randn(10 * BLOCK)
    sums = block_sums(values).numpy()
    assert norm([sums[:3], sums[3:]]) == norm([sums[5:], sums[:5]])
    assert norm([sums]) == pytest.approx(values.double().norm().item(), rel=1e-6)
    assert norm([]) == 0.0


@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e-13, 1.0, 1e17, 1e25, 1e36])
def test_values_whose_squares_leave_the_range_of_float32_count(size: float) -> None:
    values = torch.randn(3 * BLOCK) * torch.tensor([1.0, size, 0.0]).repeat_interleave(BLOCK)
    sums = block_sums(values)
    assert torch.equal(sums, torch.cat([block_sums(row) for row in values.split(BLOCK)]))
    assert sums.tolist() == pytest.approx([row.double().square().sum().item() for row in values.split(BLOCK)], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_element_makes_the_norm_nan(bad: float) -> None:
    values = torch.ones(2 * BLOCK)
    values[BLOCK + 3] = bad
    assert math.isnan(norm([block_sums(values).numpy()]))
    assert math.isnan(norm([np.array([1.0, np.inf])]))


def test_the_clip_factor_is_that_of_torch() -> None:
    assert clip_factor(3.0, None) == 1.0
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(4.0, 1.0) == 1.0 / (4.0 + 1e-6)
