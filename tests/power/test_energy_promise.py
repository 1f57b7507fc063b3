"""Tests that the mode "energy" keeps its promise where messages and their handling take time that no model knows; no time passes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.plan.clock_search import ENERGY_SLACK
from elastic.plan.fleet import Fleet
from elastic.plan.planner import plan
from elastic.plan.workload import LayerCost, Workload
from elastic.power.cycle import Cycle
from elastic.power.promise import LONGER, Promise
from elastic.power.windows import MOST_STEPS, PRECISE, STEPS, Figures, Report, Window, WorkerFigures
from tests.power.test_cycle import BETA, CLOCKS, IDLE_W, Gpus, facts, finished, view_of

USUAL = 1305


def begun(seconds: list[float], micro_batches: int, delay: float) -> tuple[Cycle, Gpus]:
    """A cycle whose stages have one layer each. `delay`: of every message, as a share of the mean seconds of a micro-batch."""
    layers = tuple(LayerCost(forward_s=each / 3, backward_s=2 * each / 3, parameters=64, activation_bytes=0) for each in seconds)
    work = Workload(layers=layers, micro_batches=micro_batches, grains=micro_batches)
    view = view_of(plan(Fleet(workers=tuple(range(len(seconds)))), work, stages=len(seconds)).plan, work)
    cycle, gpus = Cycle("energy"), Gpus(view, delay_s=delay * sum(seconds) / len(seconds))
    gpus.obey(cycle.committed(view, 0.0))
    for worker in view.workers:
        gpus.obey(cycle.known(worker, facts(worker), 0.0))
    return cycle, gpus


def everything(gpus: Gpus) -> list[tuple[float, float]]:
    """Returns seconds and joules of a step with each combination of the measured clocks, as they really are; the usual one is first."""
    steps, idle = gpus._steps(), IDLE_W * len(gpus.view.workers)
    clocks = [USUAL, *(mhz for mhz in CLOCKS if mhz >= 0.6 * USUAL - 23 and mhz != USUAL)]
    every = list(itertools.product(clocks, repeat=len(steps.work)))
    factors = {mhz: gpus.slower * (BETA * CLOCKS[0] / mhz + 1 - BETA) for mhz in clocks}
    watts = {mhz: 95 + 190 * (mhz / CLOCKS[0]) ** 3 - IDLE_W for mhz in clocks}
    took = steps.steps_s([[factors[mhz] for mhz in each] for each in every])
    busy = [sum(work.busiest_s * factors[m] * watts[m] for work, m in zip(steps.work, each, strict=True)) for each in every]
    return [(seconds, joules + idle * seconds) for seconds, joules in zip(took, busy, strict=True)]


def judge(seconds: list[float], micro_batches: int, delay: float) -> float:
    """Runs a cycle. Returns its joules over the least ones of all combinations that take as long as it may plan."""
    cycle, gpus = begun(seconds, micro_batches, delay)
    finished(cycle, gpus)
    gpus.run(cycle, 24)
    assert cycle.figures is not None
    assert cycle.figures.joules is not None
    every = everything(gpus)
    assert cycle.figures.step_s <= every[0][0] * (1 + LONGER) + 1e-9
    return cycle.figures.joules / min(joules for took, joules in every if took <= every[0][0] * (1 + ENERGY_SLACK))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.06])
def test_steps_stay_within_the_promise_and_save_nearly_what_can_be_saved(delay):
    assert judge([0.010, 0.010, 0.0125], 12, delay) <= 1.01


@pytest.mark.slow
@pytest.mark.long
@settings(max_examples=100, deadline=None)
@given(
    seconds=st.lists(st.floats(0.005, 0.02), min_size=2, max_size=3),
    micro_batches=st.sampled_from([4, 8, 16, 32]),
    delay=st.floats(0.0, 0.15),
)
def test_any_stages_with_any_delays_keep_the_promise(seconds, micro_batches, delay):
    assert judge(seconds, micro_batches, delay) <= 1.02


@pytest.mark.parametrize(("noise", "steps"), [(0.001, STEPS), (0.05, MOST_STEPS)])
def test_windows_that_are_compared_last_until_they_are_precise(noise, steps):
    window, at = Window((1,), 0.0, precise=True), 0.0
    for step in range(100):
        at += 1.0 + noise * (-1) ** step
        window.note(1, Report(step, at, step, step, None))
        if (found := window.figures()) is not None:
            break
    assert found is not None
    assert found.steps == steps
    assert len(found.times) == steps
    assert PRECISE < 0.05 / MOST_STEPS**0.5


def test_single_disturbed_steps_do_not_break_a_promise():
    usual, found = (Figures(step_s=sum(times) / 6, steps=6, workers={}, times=times) for times in ((1.0,) * 6, (1.0,) * 4 + (2.0,) * 2))
    promise = Promise(mode="energy", usual=usual, gain=0.1)
    assert promise.broken(found, LONGER) is None
    assert promise.longer(found) == 0.0


def test_a_counter_that_stood_still_with_the_usual_clocks_breaks_no_promise():
    workers = {0: WorkerFigures(busy_s=0.5, expected_s=0.5, joules=0.0)}
    usual = Figures(step_s=1.0, steps=6, workers=workers)
    now = Figures(step_s=1.0, steps=6, workers={0: WorkerFigures(busy_s=0.5, expected_s=0.5, joules=100.0)})
    assert Promise(mode="energy", usual=usual, gain=0.2).broken(now) is None
