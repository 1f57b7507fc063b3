"""Tests of the model of time and power against the clock, and of when it is not trusted."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.zeus_profiles import load
from elastic.power.frequency_model import POWER_ERROR, TIME_ERROR, Measurement, fit
from examples.nvml_standin import A100


def measured(mhz: float, beta: float, seconds: float = 0.4, noise: float = 0.0) -> Measurement:
    share = mhz / 1500
    return Measurement(mhz, seconds * (beta / share + 1 - beta) * (1 + noise), (90 + 200 * share**3) * (1 + noise))


@settings(max_examples=30)
@given(beta=st.floats(0.0, 1.0), seconds=st.floats(1e-4, 100.0), low=st.integers(600, 900), count=st.integers(3, 8))
def test_exact_measurements_give_the_model_back(beta, seconds, low, count):
    clocks = [low + round((1500 - low) * number / (count - 1)) for number in range(count)]
    found = fit(measured(mhz, beta, seconds) for mhz in clocks)
    assert found.model is not None, found.why
    for mhz in (min(clocks), max(clocks), sum(clocks) / len(clocks)):
        assert found.model.seconds_at(mhz) == pytest.approx(measured(mhz, beta, seconds).seconds, rel=1e-6)
        assert found.model.watts_at(mhz) == pytest.approx(measured(mhz, beta).watts, rel=0.05)


@settings(max_examples=30)
@given(st.lists(st.floats(-0.02, 0.02), min_size=5, max_size=5))
def test_noise_of_measurements_is_the_stated_confidence(noise):
    found = fit(measured(mhz, 0.7, noise=each) for mhz, each in zip((1500, 1300, 1100, 900, 700), noise, strict=True))
    if found.model is None:
        assert "the fit is poor" in found.why
        return
    assert max(found.model.time_error, 1e-9) <= TIME_ERROR
    assert found.model.power_error <= POWER_ERROR
    for mhz in (1500, 1100, 700):
        assert found.model.seconds_at(mhz) == pytest.approx(measured(mhz, 0.7).seconds, rel=0.05)


@pytest.mark.parametrize("clocks", [[], [1500], [1500, 1000], [1500, 1000, 1500, 1000]])
def test_fewer_than_three_clocks_are_no_model(clocks):
    found = fit(measured(mhz, 0.5) for mhz in clocks)
    assert found.model is None
    assert f"{len(set(clocks))} clocks were measured, and a model needs 3" in found.why


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.nan, math.inf, 1e300, 1e-300])
def test_measurements_that_cannot_be_true_are_left_out(bad):
    good = [measured(mhz, 0.5) for mhz in (1500, 1200, 900)]
    wrong = [Measurement(1000, bad, 100.0), Measurement(800, 0.5, bad), Measurement(bad, 0.5, 100.0)]
    found = fit([*good, *wrong])
    assert found.model is not None
    assert (found.model.clocks, found.model.low_mhz) == (3, 900)
    assert "3 measurements cannot be true" in found.why


def test_times_that_do_not_follow_the_clock_are_refused():
    found = fit([Measurement(1500, 0.4, 290.0), Measurement(1200, 0.3, 190.0), Measurement(900, 0.2, 130.0)])
    assert found.model is None
    assert "the times do not follow the clock" in found.why


def test_a_straight_line_is_not_found_in_scatter():
    found = fit(
        [Measurement(1500, 0.4, 290.0), Measurement(1300, 0.6, 190.0), Measurement(1100, 0.45, 150.0), Measurement(900, 0.7, 140.0)]
    )
    assert found.model is None
    assert "the fit is poor" in found.why


def test_the_model_covers_only_what_was_measured():
    model = fit(measured(mhz, 0.5) for mhz in (1500, 1200, 900)).model
    assert model is not None
    assert [model.covers(mhz) for mhz in (1530, 1500, 1000, 900, 870)] == [False, True, True, True, False]
    assert "from 3 clocks" in model.confidence


def test_power_limits_are_no_clocks_and_the_fit_says_so():
    """Published sweeps of power limits: the time of most networks is no linear function of 1 / limit, so no model is trusted."""
    fits = {key: fit(Measurement(limit, *sweep[limit]) for limit in sweep) for key, sweep in load().items()}
    assert len(fits) == 20
    assert fits["a40", "bert_base_uncased"].model is None
    trusted = [key for key, found in fits.items() if found.model is not None]
    assert len(trusted) < len(fits) / 2
    for key in trusted:
        model = fits[key].model
        assert model is not None
        for limit, (seconds, _) in load()[key].items():
            assert model.seconds_at(limit) == pytest.approx(seconds, rel=TIME_ERROR)


def test_between_measured_clocks_a_measured_gpu_is_met_better_than_by_the_formula():
    """A published sweep by clock: an A100 whose highest clocks are cut by its power limit."""
    sweep = {mhz: Measurement(mhz, stretch, watts) for mhz, stretch, watts in A100.sweep}
    found = fit(sweep[mhz] for mhz in (1410, 1275, 1080, 855)).model
    assert found is not None
    assert found.time_error > 0.015
    for mhz, point in sweep.items():
        assert found.seconds_at(mhz) == pytest.approx(point.seconds, rel=0.015)
        assert found.watts_at(mhz) == pytest.approx(point.watts, rel=0.06)
    for mhz in (1410, 1275, 1080, 855):
        assert found.seconds_at(mhz) == pytest.approx(sweep[mhz].seconds)
        assert found.watts_at(mhz) == pytest.approx(sweep[mhz].watts)
