"""Tests exact partial sums as a few numbers: no rounding, so the division into parts does not matter."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.engine.exact import terms
from elastic.engine.norms import norm

finite = st.floats(allow_nan=False, allow_infinity=False)
squares = st.floats(0, 1e300) | st.floats(0, 1e-290) | st.floats(0.5, 2)


def exact(values) -> Fraction:
    return sum(map(Fraction, values), Fraction(0))


@settings(deadline=None)
@given(st.lists(squares, max_size=200) | st.lists(st.floats(-(2.0**899), 2.0**899), max_size=100))
def test_terms_have_the_sum_of_all_values(values):
    found = terms(np.array(values))
    assert exact(found.tolist()) == exact(values)


@settings(deadline=None)
@given(st.lists(squares, max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_a_norm_has_the_same_bits_however_its_blocks_are_divided(values, cuts):
    whole = np.array(values)
    parts = [terms(part) for part in np.split(whole, sorted(cuts))]
    assert norm(parts) == norm([whole]) == norm([terms(whole)])
    total = exact(values)
    if total < Fraction(1.7e308):
        assert norm(parts) == math.sqrt(float(total))


@pytest.mark.parametrize("seed", range(3))
def test_there_are_few_terms_whatever_there_is_to_add(seed):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(100_000) ** 2 * 10.0 ** generator.integers(-30, 30, 100_000)
    found = terms(values)
    assert found.size <= 12
    assert math.fsum(found) == math.fsum(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(bad):
    assert np.isnan(terms(np.array([1.0, bad, 2.0]))).all()
    assert math.isnan(norm([terms(np.array([1.0, bad])), np.array([1.0])]))


def test_a_sum_above_all_numbers_is_infinite_and_no_error():
    large = np.full(3, 1.7e308)
    assert terms(large).tolist() == [math.inf]
    assert not math.isfinite(norm([large]))
    assert not math.isfinite(norm([terms(large[:1]), terms(large[1:2])]))


def test_nothing_adds_up_to_nothing():
    assert terms(np.zeros(0)).size == terms(np.zeros(5)).size == 0
    assert norm([np.zeros(0), np.zeros(0)]) == norm([]) == 0.0
