"""Tests of jobs whose GPUs, drivers or neighbours misbehave: the training goes on with the same bits, a line says why, no clock stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic.power.keeper import Keeper, restore_left
from elastic.power.nvml import Nvml
from elastic.power.records import Records
from examples.nvml_standin import FROZEN, NEGATIVE, NOBODY, NOTHING, GpuKind, StandIn
from tests.power.test_closed_loop import Training

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 60


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, library: Path) -> object:
    """The value of the training without clocks."""
    directory = tmp_path_factory.mktemp("plain")
    made = StandIn.made(directory / "gpus", [GpuKind()] * 4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.environment(library).items():
            patch.setenv(name, value)
        return Training(made, directory / "a", steps=STEPS, seconds=0.0).run("off").value


def every(standin: StandIn, **fields: object) -> None:
    for gpu in standin.gpus:
        for name, value in fields.items():
            setattr(gpu, name, value)


Begin = Callable[[StandIn], None]

FROM_THE_BEGINNING: dict[str, tuple[Begin, str]] = {
    "instances": (lambda standin: every(standin, mig=1), "is divided into instances: MIG"),
    "nothing supported": (lambda standin: every(standin, fails=3), "not supported"),
    "two clocks": (lambda standin: every(standin, graphics_count=2), "fewer than 3 clocks"),
    "frozen counter": (lambda standin: every(standin, energy_reads=FROZEN), "no clock is changed"),
    "negative sensor, no counter": (lambda standin: every(standin, energy_reads=NOTHING, power_reads=NEGATIVE), "no clock is changed"),
    "frozen sensor, no counter": (
        lambda standin: every(standin, energy_reads=NOTHING, power_reads=FROZEN, frozen_w=80.0),
        "no clock is changed",
    ),
}


@pytest.mark.parametrize("name", FROM_THE_BEGINNING)
def test_gpus_that_cannot_be_used_are_left_alone(standin, tmp_path, capfd, plain, name):
    begin, why = FROM_THE_BEGINNING[name]
    begin(standin)
    result = Training(standin, tmp_path / "a", steps=STEPS).run("energy")
    told = capfd.readouterr().err
    assert why in told
    assert "Traceback" not in told
    assert result.value == plain
    assert standin.locked == [0] * 4
    assert not any(gpu.sets for gpu in standin.gpus) or "frozen" in name or "negative" in name  # those are found by measuring


MIDWAY: dict[str, tuple[Begin, Begin, str]] = {
    "a lost GPU": (lambda standin: setattr(standin.gpus[0], "fails", 15), lambda standin: every(standin, fails=0), "lost GPU"),
    "no permission any more": (lambda standin: every(standin, may_set=NOBODY), lambda standin: every(standin, may_set=0), "no permission"),
    "a driver that vanishes": (
        lambda standin: setattr(standin.state, "gone", 1),
        lambda standin: setattr(standin.state, "gone", 0),
        "uninitialised",
    ),
    "clocks that are not supported any more": (
        lambda standin: every(standin, graphics_count=2),
        lambda standin: every(standin, graphics_count=len(GpuKind().graphics)),
        "the nearest of its 2 clocks is",
    ),
    "a counter that begins again": (lambda standin: every(standin, energy_j=0.0), lambda _: None, ""),
    "a counter that freezes": (lambda standin: every(standin, energy_reads=FROZEN), lambda _: None, ""),
}


@pytest.mark.parametrize("name", MIDWAY)
def test_gpus_that_fail_while_clocks_are_set_give_them_back(standin, tmp_path, capfd, plain, name):
    fail, mend, why = MIDWAY[name]
    hit = []

    def meanwhile(training: Training) -> None:
        if training.until(training.locked):
            fail(standin)
            hit.append(list(standin.locked))

    result = Training(standin, tmp_path / "a", steps=STEPS).run("energy", meanwhile)
    told = capfd.readouterr().err
    assert hit
    assert any(hit[0])
    assert why in told
    assert "Traceback" not in told
    assert result.value == plain
    mend(standin)
    restore_left(tmp_path / "clocks")
    assert standin.locked == [0] * 4


def test_a_counter_that_wraps_is_counted_on(standin, tmp_path):
    every(standin, counter_bits=32, energy_j=(1 << 32) / 1000 - 300.0)
    training = Training(standin, tmp_path / "a", steps=STEPS)
    training.run("energy")
    assert all(gpu.energy_j > (1 << 32) / 1000 for gpu in standin.gpus[:2])
    now, idle = training.energy["now"], sum(gpu.idle_w for gpu in standin.gpus[:2])
    assert idle * now["step_s"] < now["joules"] < 6 * idle * now["step_s"]
    assert training.energy["models"]


def test_a_record_of_another_boot_does_not_let_a_job_touch_the_clock_of_today(standin, tmp_path, capfd, plain):
    uuid, directory = standin.uuids[0], tmp_path / "clocks"
    owned = Records(directory, "a-boot-before").own(uuid)
    owned.record("of-that-boot", 1080)
    owned.release()
    standin.gpus[0].locked_min = standin.gpus[0].locked_max = 1215  # an operator has locked it since
    assert Training(standin, tmp_path / "a", steps=STEPS).run("energy").value == plain
    assert "locked to 1215 MHz by somebody else" in capfd.readouterr().err
    assert standin.locked == [1215, 0, 0, 0]
    assert standin.gpus[0].resets == 0
    assert Records(directory).uuids() == []


def test_a_gpu_of_another_job_is_left_as_that_one_set_it(standin, tmp_path, capfd, plain):
    nvml = Nvml()
    other = Keeper(nvml, Records(tmp_path / "clocks"), "neighbour")
    other.lock(standin.uuids[0], 1080, [os.getpid()])
    assert Training(standin, tmp_path / "a", steps=STEPS).run("energy").value == plain
    assert "in the hands of job neighbour" in capfd.readouterr().err
    assert standin.locked == [1080, 0, 0, 0]
    assert other.close() == []
    nvml.close()
