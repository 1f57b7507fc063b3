"""Tests of what is done about the clocks of a view, with made-up GPUs and reports; no time passes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from elastic.layout.layout import spread
from elastic.layout.regions import LayerSpec, ModelSpec, ParameterSpec
from elastic.plan.clocks import JobSteps
from elastic.plan.fleet import Fleet
from elastic.plan.plan import Plan
from elastic.plan.planner import plan
from elastic.plan.workload import LayerCost, Workload
from elastic.power.cycle import TRIES, Cycle, Orders
from elastic.power.gpu_facts import GpuFacts
from elastic.power.nvml import ClockLook, SupportedClocks
from elastic.power.promise import Promise
from elastic.power.windows import SECONDS, STEPS, Figures, Report, Window, WorkerFigures
from elastic.view import Member, View

CLOCKS = tuple(range(1530, 600, -45))
IDLE_W, BETA = 55.0, 0.9


def workload(layers: int = 9, micro_batches: int = 16) -> Workload:
    each = LayerCost(forward_s=0.001, backward_s=0.002, parameters=64, activation_bytes=0)
    return Workload(layers=(each,) * layers, micro_batches=micro_batches, grains=micro_batches)


def view_of(made: Plan, work: Workload, epoch: int = 1) -> View:
    members = tuple(Member(worker=worker, host="h", address="") for worker in sorted(made.workers))
    parameters = [ParameterSpec(name=f"{number}.w", shape=(64,), dtype="float32", start=0) for number in range(len(work.layers))]
    model = ModelSpec(layers=tuple(LayerSpec(index=number, parameters=(each,)) for number, each in enumerate(parameters)))
    layout = spread(model, [(stage.layers, stage.members) for stage in made.stages])
    return View(epoch=epoch, attempt=0, members=members, plan=made, layout=layout, workload=work)


@dataclass
class Gpus:
    """GPUs whose work takes `slower` times the workload's seconds at the highest clock. `disturbed` multiplies steps at a set clock.

    Messages take `delay_s` longer than the workload says.
    """

    view: View
    slower: float = 2.0
    beta: float = BETA
    scatter: tuple[float, ...] = (1.0,)
    disturbed: float = 1.0
    delay_s: float = 0.0
    sustains: int = 9999
    usual: int = 1305
    odd: int | None = None  # a worker whose seconds do not follow its clock
    clocks: dict[int, int | None] = field(default_factory=dict)
    drift: float = 0.0  # by which share each step takes longer than the one before, since the machine becomes slower
    now: float = 0.0
    step: int = 0
    sums: dict[int, list[float]] = field(default_factory=dict)
    made: dict[int, JobSteps] = field(default_factory=dict)

    def run(self, cycle: Cycle, steps: int = 12) -> list[str]:
        """Takes steps with the clocks in force, and obeys the cycle. Returns what it told the user."""
        said = []
        for _ in range(steps):
            work = self._steps()
            factors = [self._factor(stage.members[0]) for stage in self.view.plan.stages]
            took = work.steps_s([factors])[0] * (self.disturbed if any(self.clocks.values()) else 1.0)
            took *= (1 + self.drift) ** self.step
            self.now, self.step = self.now + took, self.step + 1
            for stage, share, factor in zip(self.view.plan.stages, work.work, factors, strict=True):
                for worker in stage.members:
                    self._note(worker, share.busiest_s, share.busiest_s * factor, took)
            for worker in self.view.workers:
                computed_s, expected_s, joules = self.sums[worker]
                orders = cycle.noted(worker, Report(self.step, self.now, computed_s, expected_s, joules), self.now)
                said += self.obey(orders)
                if orders.clocks:
                    cycle.obeyed(self.now)
        return said

    def _steps(self) -> JobSteps:
        """The view's steps, which remember what they have simulated."""
        if self.view.epoch not in self.made:
            made = JobSteps(self.view.workload, self.view.fleet, self.view.plan)
            self.made[self.view.epoch] = made.delayed(self.delay_s)
        return self.made[self.view.epoch]

    def obey(self, orders: Orders) -> list[str]:
        self.clocks.update(orders.clocks)
        return [orders.say] if orders.say else []

    def _factor(self, worker: int) -> float:
        mhz = self.clocks.get(worker) or self.usual
        mhz = min(mhz, self.sustains)
        if worker == self.odd:
            return self.slower * (1.0, 1.15, 0.9)[mhz // 45 % 3]
        return self.slower * (self.beta * 1530 / mhz + 1 - self.beta) * self.scatter[mhz // 45 % len(self.scatter)]

    def _note(self, worker: int, expected_s: float, busy_s: float, took: float) -> None:
        mhz = min(self.clocks.get(worker) or self.usual, self.sustains)
        joules = busy_s * (95 + 190 * (mhz / 1530) ** 3) + (took - busy_s) * IDLE_W
        kept = self.sums.setdefault(worker, [0.0, 0.0, 0.0])
        self.sums[worker] = [a + b for a, b in zip(kept, (busy_s, expected_s, joules), strict=True)]


def facts(worker: int, clocks: tuple[int, ...] = CLOCKS, usual: int = 1305) -> GpuFacts:
    return GpuFacts(uuid=f"GPU-{worker}", clocks=SupportedClocks((877,), clocks), usual_mhz=usual, idle_w=IDLE_W)


def light_first(made: Plan) -> Plan:
    """The plan with the layers of its stages in reverse order: the busiest stages are the last ones."""
    counts = [len(stage.layers) for stage in reversed(made.stages)]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    layers = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    return replace(made, stages=tuple(replace(stage, layers=own) for stage, own in zip(made.stages, layers, strict=True)))


def begun(mode, work: Workload | None = None, stages: int = 4, **options) -> tuple[Cycle, Gpus, list[str]]:
    """A cycle and its GPUs at the beginning of a view, and what it said."""
    made = plan(Fleet(workers=tuple(range(stages))), work or workload(), stages=stages).plan
    view = view_of(made if work else light_first(made), work or workload())
    cycle, gpus = Cycle(mode), Gpus(view, **options)
    said = gpus.obey(cycle.committed(view, 0.0))
    for worker in view.workers:
        said += gpus.obey(cycle.known(worker, facts(worker), 0.0))
    return cycle, gpus, said


def finished(cycle: Cycle, gpus: Gpus) -> list[str]:
    said = []
    for _ in range(40):
        said += gpus.run(cycle)
        if cycle.state in ("held", "undone"):
            return said
    pytest.fail(f"the cycle is still {cycle.state}")


def test_energy_is_measured_saved_and_kept():
    cycle, gpus, _ = begun("energy")
    said = finished(cycle, gpus)
    assert cycle.state == "held"
    before, now = cycle.before, None
    gpus.run(cycle, 20)
    now = cycle.figures
    assert before is not None
    assert now is not None
    assert now.step_s <= before.step_s * 1.006
    assert now.joules < 0.96 * before.joules
    assert said[0].count("falls to") >= 2
    assert said[1].startswith("measured with these clocks: ")
    assert {choices.at(1305).stretch for choices in cycle.choices.values()} == {1.0}
    assert len(cycle.frontier()) >= 5


def test_speed_raises_the_bottleneck():
    cycle, gpus, _ = begun("speed")
    said = finished(cycle, gpus)
    slow = next(stage.members[0] for stage in gpus.view.plan.stages if len(stage.layers) == 3)
    assert gpus.clocks[slow] == 1530
    assert cycle.state == "held"
    assert "rises to 1530 MHz from 1305" in said[0]


def test_a_promise_that_is_not_kept_is_undone_after_a_second_look():
    cycle, gpus, _ = begun("energy")
    while cycle.state != "checking":
        gpus.run(cycle, 1)
    gpus.disturbed = 1.3
    said = finished(cycle, gpus)
    assert cycle.state == "undone"
    assert not any(gpus.clocks.values())
    assert len(said) <= TRIES
    assert all("% longer; stage " in line for line in said[:-1])
    assert said[-1].startswith("the clocks are as before again: steps take")


def test_a_promise_of_speed_that_is_not_kept_is_undone_after_a_second_look():
    cycle, gpus, _ = begun("speed")
    while cycle.state != "checking":
        gpus.run(cycle, 1)
    gpus.disturbed = 1.3
    said = finished(cycle, gpus)
    assert (cycle.state, len(said)) == ("undone", 1)
    assert not any(gpus.clocks.values())
    assert said[0].startswith("the clocks are as before again: steps take")


def test_one_disturbed_window_is_forgiven():
    cycle, gpus, _ = begun("energy")
    while cycle.state != "checking":
        gpus.run(cycle, 1)
    gpus.disturbed = 1.3
    while cycle.state != "comparing":
        gpus.run(cycle, 1)
    assert not any(gpus.clocks.values())
    gpus.disturbed = 1.0
    finished(cycle, gpus)
    assert cycle.state == "held"
    assert any(gpus.clocks.values())


def test_a_machine_that_becomes_slower_meanwhile_breaks_no_promise():
    """Each window is a per cent slower than the one before it: so are the chosen clocks, when they are measured behind the usual ones."""
    cycle, gpus, _ = begun("energy")
    while cycle.state != "checking":
        gpus.run(cycle, 1)
    gpus.drift = 0.0015
    said = finished(cycle, gpus)
    assert cycle.state == "held"
    assert len(said) == 1
    assert said[0].startswith("measured with these clocks: ")
    assert any(gpus.clocks.values())


def test_a_poor_fit_changes_nothing_and_says_why():
    cycle, gpus, _ = begun("energy", scatter=(1.0, 1.4, 0.8))
    said = finished(cycle, gpus)
    assert not any(gpus.clocks.values())
    assert "no clock is changed" in said[-1]
    assert "the fit is poor" in said[-1] or "do not follow the clock" in said[-1]


def test_fewer_than_three_clocks_change_nothing():
    work = workload()
    view = view_of(plan(Fleet(workers=(0,)), work).plan, work)
    cycle, gpus = Cycle("energy"), Gpus(view)
    gpus.obey(cycle.committed(view, 0.0))
    said = gpus.obey(cycle.known(0, facts(0, clocks=(1530, 1305)), 0.0))
    assert said == ["no clock is changed: GPU GPU-0 supports fewer than 3 clocks that differ enough"]
    gpus.run(cycle, 20)
    assert cycle.figures is not None
    assert not any(gpus.clocks.values())


def test_without_a_mode_energy_is_measured_and_nothing_is_set():
    cycle, gpus, said = begun(None)
    said += gpus.run(cycle, 30)
    assert (said, any(gpus.clocks.values())) == ([], False)
    assert cycle.figures is not None
    assert cycle.figures.joules is not None


def test_after_a_loss_the_clocks_of_the_plan_are_set_at_once():
    cycle, gpus, _ = begun("speed")
    finished(cycle, gpus)
    clocking = cycle.clocking("speed")
    assert set(clocking.choices) == {0, 1, 2, 3}
    work = gpus.view.workload
    bare = plan(Fleet(workers=(0, 1, 2)), work, stages=3).plan
    after = view_of(replace(bare, clocks=(None, 1530, 1530)), work, epoch=2)
    orders = cycle.committed(after, gpus.now)
    gpus.view, gpus.sums, gpus.clocks = after, {}, {}
    gpus.obey(orders)
    assert orders.clocks == {0: None, 1: 1530, 2: 1530}
    assert cycle.stretch(1) == pytest.approx((0.9 + 0.1) / (0.9 * 1530 / 1305 + 0.1), rel=1e-6)
    finished(cycle, gpus)
    assert cycle.state == "held"


def test_after_a_loss_a_worker_that_is_slower_than_its_model_has_the_clocks_undone():
    cycle, gpus, _ = begun("speed")
    finished(cycle, gpus)
    work = gpus.view.workload
    after = view_of(replace(plan(Fleet(workers=(0, 1, 2)), work, stages=3).plan, clocks=(None, 1530, 1530)), work, epoch=2)
    gpus.obey(cycle.committed(after, gpus.now))
    gpus.view, gpus.sums, gpus.slower = after, {}, 2.6
    assert "times as long at 1530 MHz as the model of its GPU says" in finished(cycle, gpus)[-1]
    assert [gpus.clocks[worker] for worker in after.workers] == [None] * 3


def test_a_replacement_with_a_known_gpu_needs_no_new_measurement():
    cycle, gpus, _ = begun("energy")
    finished(cycle, gpus)
    work = gpus.view.workload
    renamed = gpus.view.plan.renamed({0: 0, 1: 1, 2: 2, 3: 7})
    after = view_of(renamed, work, epoch=2)
    gpus.obey(cycle.committed(after, gpus.now))
    assert cycle.state == "waiting"
    gpus.obey(cycle.known(7, replace(facts(3), uuid="GPU-3"), gpus.now))
    assert cycle.state == "held"  # the plan of this view has no clocks


def test_a_gpu_that_does_not_sustain_its_highest_clock_is_not_planned_with_it():
    cycle, gpus, _ = begun("speed", sustains=1440)
    while cycle.state != "sweeping" or 1530 not in gpus.clocks.values():
        gpus.run(cycle, 1)
    for worker in gpus.view.workers:
        cycle.throttled(worker, 1440, gpus.now)
    finished(cycle, gpus)
    assert max(clock or 0 for clock in gpus.clocks.values()) <= 1440
    assert max(point.mhz for choices in cycle.choices.values() for point in choices.points) <= 1440


def test_a_window_waits_for_every_worker_and_leaves_out_the_first_steps():
    window = Window((1, 2), began_at=10.0)
    window.note(3, Report(5, 11.0, 1.0, 1.0, 1.0))
    window.note(1, Report(5, 9.0, 1.0, 1.0, 1.0))  # before the clocks were set
    for step in range(6, 20):
        window.note(1, Report(step, 10.0 + step, 2.0 * step, 1.0 * step, 3.0 * step))
    assert window.figures() is None
    for step in range(8, 9 + STEPS):
        window.note(2, Report(step, 10.0 + step, 1.0 * step, 1.0 * step, None))
    found = window.figures()
    assert found is not None
    assert found.step_s * found.steps >= SECONDS
    assert found.workers[1] == WorkerFigures(busy_s=2.0, expected_s=1.0, joules=3.0)
    assert (found.workers[1].ratio, found.joules) == (2.0, None)
    assert found.watts(2, 50.0) is None


def test_watts_while_computing_leave_out_the_idle_rest():
    figures = Figures(step_s=2.0, steps=6, workers={1: WorkerFigures(busy_s=0.5, expected_s=0.5, joules=0.5 * 200 + 1.5 * 50)})
    assert figures.watts(1, 50.0) == pytest.approx(200.0)


@pytest.mark.parametrize(
    ("mode", "step_s", "joules", "kept"),
    [
        ("speed", 0.9, 200.0, True),
        ("speed", 0.97, 100.0, False),
        ("energy", 1.01, 80.0, True),
        ("energy", 1.02, 80.0, False),
        ("energy", 1.0, 95.0, False),
        ("energy", 1.0, None, True),
    ],
)
def test_promises(mode, step_s, joules, kept):
    usual, found = (
        Figures(step_s=took, steps=6, workers={1: WorkerFigures(busy_s=0.5, expected_s=0.5, joules=used)})
        for took, used in ((1.0, 100.0), (step_s, joules))
    )
    assert (Promise(mode=mode, usual=usual, gain=0.15).broken(found) is None) == kept


def test_the_usual_clock_is_the_one_that_is_seen_while_gpus_compute():
    cycle, gpus, _ = begun("energy", usual=1485)
    for worker in gpus.view.workers:
        for mhz in (1485, 1490, 1305):
            assert cycle.looks
            cycle.saw(worker, ClockLook(mhz, frozenset(), mhz < 1485))
        cycle.saw(worker, ClockLook(135, frozenset({"idle"}), True))
    said = finished(cycle, gpus)
    assert {each.usual for each in cycle.choices.values()} == {1485}
    assert not cycle.looks
    assert " MHz from 1485" in said[0]


@pytest.mark.parametrize(
    ("looks", "locked"),
    [
        ([(990, "")] * 4, True),
        ([(990, ""), (135, "idle")] * 4, True),
        ([(990, ""), (900, "heat")] * 4, True),
        ([(990, "")] * 3, False),
        ([(990, "")] * 9 + [(1305, "")], False),
        ([(990, "power cap")] * 9, False),
        ([(135, "idle")] * 9, False),
    ],
)
def test_a_lock_of_somebody_else_shows_while_the_usual_clocks_are_measured(looks, locked):
    cycle, gpus, _ = begun("energy")
    worker = gpus.view.workers[1]
    for mhz, reason in looks:
        cycle.saw(worker, ClockLook(mhz, frozenset({reason} - {""}), mhz < 1305))
    if not locked:
        assert not any("somebody else" in line for line in finished(cycle, gpus))
        return
    (said,) = [line for _ in range(10) for line in gpus.run(cycle)]
    assert said.startswith("no clock is changed: ")
    assert f"{cycle.facts[worker].uuid} is locked to 990 MHz by somebody else" in said
    assert cycle.mode is None


def test_the_promised_share_is_of_all_gpus_also_where_some_have_no_model():
    cycle, gpus, _ = begun("energy")
    odd = gpus.view.plan.stages[0].members[0]
    gpus.odd = odd
    finished(cycle, gpus)
    assert cycle.facts[odd].uuid not in cycle.choices
    plan, before, promise = cycle.plan, cycle.before, cycle._promise
    assert plan is not None
    assert before is not None
    assert promise is not None
    assert before.joules is not None
    assert plan.usual.joules < 0.9 * before.joules
    assert promise.gain == pytest.approx((plan.usual.joules - plan.chosen.joules) / before.joules)
    assert cycle.state == "held"
