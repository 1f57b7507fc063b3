"""Tests of joules from counters and sensors, also from bad ones."""

from __future__ import annotations

import pytest

from elastic.power.meter import Meter, advanced_mj


@pytest.mark.parametrize(
    ("before", "now", "moved"),
    [
        (10, 25, 15),
        (10, 10, 0),
        ((1 << 32) - 5, 7, 12),
        ((1 << 64) - 5, 7, 12),
        (5_000_000, 100, None),
        ((1 << 32) - 5, 3_500_000_000, None),
    ],
)
def test_a_counter_that_wraps_is_told_from_one_that_began_again(before, now, moved):
    assert advanced_mj(before, now) == moved


def test_joules_are_counted_across_a_wrap():
    meter = Meter()
    for second in range(5):
        meter.counter(((1 << 32) - 300_000 + 200_000 * second) % (1 << 32), float(second))
    assert meter.joules == 800.0
    assert meter.watts == 200.0


def test_a_counter_that_began_again_loses_only_the_time_between():
    meter = Meter()
    for at, value in enumerate([5_000_000, 5_200_000, 100, 200_100]):
        meter.counter(value, float(at))
    assert (meter.joules, meter.seconds, meter.restarts, meter.watts) == (400.0, 2.0, 1, 200.0)


def test_an_impossible_jump_is_no_energy():
    meter = Meter()
    for at, value in enumerate([0, 100_000, 10**12, 10**12 + 100_000]):
        meter.counter(value, float(at))
    assert (meter.joules, meter.restarts) == (200.0, 1)


def test_a_frozen_counter_has_no_value_until_it_moves():
    meter = Meter()
    for at in range(8):
        meter.counter(1000, float(at))
    assert meter.watts is None
    assert meter.fault == "its energy counter stands still, for 7 s"
    meter.counter(201_000, 8.0)
    assert meter.fault is None


def test_a_counter_of_an_idle_gpu_may_stand_still():
    meter = Meter()
    for at in range(20):
        meter.counter(1000, float(at), busy=False)
    assert meter.fault is None
    assert meter.watts == 0.0


@pytest.mark.parametrize("watts", [-55.0, float("nan"), float("inf"), 1e6])
def test_an_impossible_power_is_not_counted(watts):
    meter = Meter()
    meter.power(100.0, 0.0)
    meter.power(watts, 1.0)
    assert meter.watts is None
    assert meter.fault is not None
    assert "its power sensor reads" in meter.fault
    meter.power(100.0, 2.0)
    meter.power(101.0, 3.0)
    assert (meter.joules, meter.fault) == (100.5, None)


def test_a_frozen_sensor():
    meter = Meter()
    for at in range(8):
        meter.power(123.4, float(at))
    assert meter.watts is None
    assert meter.fault == "its power sensor has read 123.4 W all the time, for 7 s"


def test_power_is_integrated():
    meter = Meter()
    for at, watts in enumerate([100.0, 200.0, 200.0]):
        meter.power(watts, float(at))
    assert meter.joules == 350.0
