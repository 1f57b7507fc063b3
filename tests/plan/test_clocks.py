"""Tests of the choice of clocks: against all combinations, on published power sweeps and on made-up GPUs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.zeus_profiles import GPUS, choices_of, load
from elastic.errors import PlanError
from elastic.plan.clock_search import ENERGY_SLACK, ClockSearch, choose
from elastic.plan.clocks import ClockChoices, Clocked, ClockPoint, JobSteps, common, joules, stretched
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Plan, Stage
from elastic.plan.workload import LayerCost, Workload

IDLE_W = 50.0


def gpu(clocks=(1500, 1400, 1300, 1100, 900, 700), usual=1300, beta=0.9, dynamic_w=200.0) -> ClockChoices:
    def took(mhz: float) -> float:
        return beta * 1500 / mhz + 1 - beta

    points = tuple(ClockPoint(mhz, took(mhz) / took(usual), 100 + dynamic_w * (mhz / 1500) ** 3) for mhz in clocks)
    return ClockChoices(points=points, usual=usual, idle_w=IDLE_W)


def steps(seconds, micro_batches: int = 8, members: int = 1) -> JobSteps:
    layers = tuple(LayerCost(forward_s=each / 3, backward_s=2 * each / 3, parameters=64, activation_bytes=0) for each in seconds)
    workload = Workload(layers=layers, micro_batches=micro_batches, grains=micro_batches)
    workers = iter(range(len(seconds) * members))
    stages = [
        Stage(layers=range(number, number + 1), members=tuple(next(workers) for _ in range(members))) for number in range(len(seconds))
    ]
    routes = [tuple(stage.members[grain % members] for grain in range(micro_batches)) for stage in stages]
    found = Plan(stages=tuple(stages), routes=tuple(routes), step_s=0.0, why="")
    return JobSteps(workload, Fleet(workers=tuple(range(len(seconds) * members))), found)


def every(search: ClockSearch) -> list[Clocked]:
    """All combinations of the clocks that are considered."""
    return [search.clocked(points) for points in itertools.product(*search.options())]


def test_energy_is_that_of_busy_and_idle_gpus():
    made = steps([0.1, 0.2], micro_batches=4, members=2)
    choices = [gpu(), None]
    step_s = made.steps_s([[1.0, 1.0]])[0]
    usual = gpu().at(1300)
    assert joules(made.work, choices, [usual, None], step_s) == pytest.approx(0.4 * (usual.watts - IDLE_W) + 2 * IDLE_W * step_s)


def test_the_slow_stage_rises_in_the_mode_speed_and_the_others_stay():
    made = steps([0.1, 0.1, 0.1, 0.2], micro_batches=32)
    plan = choose("speed", made, [gpu()] * 4)
    assert plan.chosen.clocks == (None, None, None, 1500)
    assert plan.why.startswith("stage 3 rises to 1500 MHz from 1300: ")
    fastest = ClockSearch(made, [gpu()] * 4).fastest
    assert plan.usual.step_s - plan.chosen.step_s >= 0.95 * (plan.usual.step_s - fastest.step_s)
    assert plan.chosen.joules < fastest.joules


def test_all_stages_rise_in_the_mode_speed_if_each_counts():
    plan = choose("speed", steps([0.1, 0.1, 0.1, 0.1], micro_batches=2), [gpu()] * 4)
    assert plan.chosen.clocks == (1500,) * 4


def test_energy_is_saved_where_stages_wait_and_the_step_stays():
    plan = choose("energy", steps([0.1, 0.1, 0.1, 0.2], micro_batches=32), [gpu()] * 4)
    assert plan.chosen.step_s <= plan.usual.step_s * (1 + ENERGY_SLACK)
    assert plan.chosen.joules < 0.9 * plan.usual.joules
    assert all(clock is not None and clock < 1300 for clock in plan.chosen.clocks[:3])


def test_nothing_is_changed_without_a_gain():
    only = ClockChoices(points=(ClockPoint(1300, 1.0, 200.0),), usual=1300, idle_w=IDLE_W)
    for mode in ("speed", "energy"):
        plan = choose(mode, steps([0.1, 0.2]), [only, only])
        assert not plan.changes
        assert "no clock is changed" in plan.why
    assert not choose("energy", steps([0.1, 0.2]), [None, None]).changes


def test_a_stage_without_a_model_keeps_its_clock():
    plan = choose("energy", steps([0.1, 0.2, 0.1], micro_batches=32), [gpu(), gpu(), None])
    assert plan.chosen.clocks[2] is None
    assert plan.chosen.clocks[0] is not None


@settings(max_examples=20)
@given(
    seconds=st.lists(st.sampled_from([0.05, 0.1, 0.13, 0.2]), min_size=2, max_size=3),
    micro_batches=st.integers(1, 6),
    betas=st.lists(st.sampled_from([0.2, 0.6, 1.0]), min_size=3, max_size=3),
    slack=st.sampled_from([0.0, 0.05, 0.2]),
)
def test_the_least_energy_within_a_time_is_that_of_all_combinations(seconds, micro_batches, betas, slack):
    search = ClockSearch(steps(seconds, micro_batches), [gpu(clocks=(1500, 1300, 1100, 800), beta=beta) for beta in betas[: len(seconds)]])
    limit_s = search.fastest.step_s * (1 + slack)
    best = min((each for each in every(search) if each.step_s <= limit_s), key=lambda each: each.joules)
    beyond = ClockSearch(search.steps, search.choices)
    beyond._search(beyond.options()).most_work = 0  # as if the combinations were too many
    for found, above in ((search.within(limit_s), 1e-9), (beyond.within(limit_s), 2e-3)):
        assert found is not None
        assert found.step_s <= limit_s * (1 + 1e-9)
        assert found.joules <= best.joules * (1 + above)


@pytest.mark.slow
@pytest.mark.parametrize("name", [GPUS[0], *(pytest.param(each, marks=pytest.mark.long) for each in GPUS[1:])])
def test_the_frontier_on_published_sweeps_is_within_2_percent_of_all_combinations(name):
    sweeps = load()
    networks = ("bert_base_uncased", "deepspeech2", "resnet50")
    choices = [choices_of(name, sweeps[name, network]) for network in networks]
    few, many = (ClockSearch(steps([0.1, 0.16, 0.13], 8), choices) for _ in range(2))
    many._search(many.options()).most_work = 0
    tried = every(few)
    for frontier in (few.frontier(8), many.frontier(8)):
        assert len(frontier) >= 3
        for point in frontier:
            best = min(each.joules for each in tried if each.step_s <= point.step_s * (1 + 1e-9))
            assert point.joules <= best * 1.002
        assert [point.step_s for point in frontier] == sorted(point.step_s for point in frontier)
        assert [point.joules for point in frontier] == sorted((point.joules for point in frontier), reverse=True)


@pytest.mark.long
@pytest.mark.parametrize("name", GPUS)
def test_more_combinations_than_are_ever_computed_are_searched_as_well_as_all_of_them(name):
    """Seven stages, up to 110,000 combinations."""
    sweeps = load()
    networks = sorted({network for gpu, network in sweeps if gpu == name})
    seconds = [0.1, 0.16, 0.13, 0.09, 0.15, 0.12, 0.1]
    choices = [choices_of(name, sweeps[name, networks[stage % len(networks)]]) for stage in range(len(seconds))]
    few, many = (ClockSearch(steps(seconds, 8), choices) for _ in range(2))
    few._search(few.options()).most_work, many._search(many.options()).most_work = 10**9, 0
    first, last = few.fastest.step_s, few.clocked([points[-1] for points in few.options()]).step_s
    for number in range(8):
        best, found = (search.within(first + (last - first) * number / 7) for search in (few, many))
        assert best is not None
        assert found is not None
        assert found.joules <= best.joules * 1.002


def test_no_clocks_are_fast_enough():
    search = ClockSearch(steps([0.1, 0.2]), [gpu(), gpu()])
    assert search.within(search.fastest.step_s * 0.9) is None


def test_useful_clocks_are_those_that_no_other_beats():
    points = (ClockPoint(3, 1.0, 300.0), ClockPoint(2, 1.1, 200.0), ClockPoint(1, 1.2, 199.0))
    assert [point.mhz for point in ClockChoices(points=points, usual=3, idle_w=50.0).useful] == [3, 2]


def test_gpus_of_a_stage_share_the_clocks_that_all_have():
    other = gpu(clocks=(1400, 1300, 900, 600), dynamic_w=100.0)
    found = common([gpu(), other])
    assert found is not None
    assert [point.mhz for point in found.points] == [1400, 1300, 900]
    assert found.at(1400).watts == pytest.approx((gpu().at(1400).watts + other.at(1400).watts) / 2)
    assert common([gpu(), None]) is None
    assert common([gpu(), gpu(usual=1100)]) is None
    assert common([]) is None


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_values_that_cannot_be_true_are_refused(value):
    for point in (ClockPoint(1300, value, 100.0), ClockPoint(1300, 1.0, value)):
        with pytest.raises(PlanError, match="measure them again"):
            ClockChoices(points=(point,), usual=1300, idle_w=1.0)
    with pytest.raises(PlanError, match="is not one of"):
        ClockChoices(points=(ClockPoint(1300, 1.0, 1.0),), usual=1400, idle_w=1.0)
    with pytest.raises(PlanError, match="1 MHz is not one of"):
        gpu().at(1)


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ((ClockPoint(1300, 1.0, 9.0), ClockPoint(900, 0.0, 9.0)), "must be above 0, and the time at 900 is 0"),
        ((ClockPoint(1300, 1.0, 9.0), ClockPoint(0, 1.0, 9.0)), "must be above 0"),
        ((ClockPoint(1300, 1.0, 9.0), ClockPoint(1300, 2.0, 9.0)), "the clock 1300 is there more than once"),
    ],
)
def test_no_work_is_done_in_no_time_and_a_clock_has_one_time(points, why):
    with pytest.raises(PlanError, match=why):
        ClockChoices(points=points, usual=1300, idle_w=1.0)


@st.composite
def any_gpu(draw) -> ClockChoices | None:
    """A GPU whose times and watts may follow its clocks or not; None if they are not known."""
    clocks = draw(st.lists(st.integers(1, 2000), min_size=1, max_size=6, unique=True))
    usual = draw(st.sampled_from(clocks))
    values = st.floats(0.1, 10.0) | st.floats(0.9, 1.1)
    points = tuple(
        ClockPoint(mhz, 1.0 if mhz == usual else draw(values), draw(st.floats(0.0, 500.0))) for mhz in sorted(clocks, reverse=True)
    )
    return draw(st.none() | st.just(ClockChoices(points=points, usual=usual, idle_w=draw(st.floats(0.0, 400.0)))))


@pytest.mark.long
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_promises_hold_for_any_stages_and_any_gpus(data):
    seconds = data.draw(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5))
    made = steps(seconds, micro_batches=data.draw(st.integers(1, 6)))
    choices = [data.draw(any_gpu()) for _ in seconds]
    for mode in ("speed", "energy"):
        found = choose(mode, made, choices)
        for clock, choice in zip(found.chosen.clocks, choices, strict=True):
            assert clock is None or (choice is not None and clock in {point.mhz for point in choice.points})
        usual = found.usual
        if mode == "speed":
            assert found.chosen.step_s <= usual.step_s * (1 + 1e-9)
        else:
            assert found.chosen.step_s <= usual.step_s * (1 + ENERGY_SLACK) * (1 + 1e-8)
            assert found.chosen.joules <= usual.joules * (1 + 1e-9)


def test_steps_that_take_no_time_gain_nothing():
    for mode in ("speed", "energy"):
        assert not choose(mode, steps([0.0, 0.0]), [gpu(), gpu()]).changes


def test_stretches_multiply_slowdowns():
    fleet = stretched(Fleet(workers=(1, 2, 3), slowdowns={1: 2.0}), {1: 0.5, 2: 1.5})
    assert fleet.slowdowns == {2: 1.5}


@pytest.mark.parametrize(("slow", "clocks"), [(1.25, (1080, None, 1080, 1080)), (1.27, (1050, None, 1050, 1050))])
def test_stages_whose_clocks_fall_stay_faster_than_the_slow_one(slow, clocks):
    """At 1050 MHz work takes 1.245 times as long and a bit less energy: fast enough for 1.25, if no second were irregular."""
    points = (ClockPoint(1410, 1.0, 478.0), ClockPoint(1080, 1.2237, 284.7), ClockPoint(1050, 1.2450, 280.4))
    choices = [ClockChoices(points=points, usual=1410, idle_w=70.0)] * 4
    made = steps([0.04, 0.04 * slow, 0.04, 0.04], micro_batches=512)
    least = ClockSearch(made, choices).within(ClockSearch(made, choices).usual.step_s * (1 + ENERGY_SLACK))
    assert least is not None
    assert least.clocks == (1050, None, 1050, 1050)
    assert choose("energy", made, choices).chosen.clocks == clocks
