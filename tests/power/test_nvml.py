"""Tests that the real pynvml calls work on the stand-in driver, and that each error has its condition."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pynvml
import pytest

from elastic.errors import PowerError
from elastic.power import nvml as nvml_module
from elastic.power.conditions import Condition, condition_of
from elastic.power.nvml import ForeignLock, Gpu, Nvml
from examples.nvml_standin import NEGATIVE, NOBODY, GpuKind, StandIn, build, computing

ROOT = Path(__file__).parents[2]


def refused(call, *arguments) -> PowerError:
    with pytest.raises(PowerError) as caught:
        call(*arguments)
    return caught.value


def test_gpus_are_found_by_uuid(nvml, standin):
    assert nvml.uuids() == standin.uuids
    gpu = nvml.gpu(standin.uuids[2])
    assert gpu.name() == "Stand-in GPU"
    clocks = gpu.supported()
    assert clocks.memory == (877,)
    assert clocks.graphics[:2] == (1530, 1485)
    assert gpu.usual_mhz() == 1305
    assert gpu.memory_mhz() == 877


@pytest.mark.slow
def test_a_lock_is_in_force_for_every_process_until_it_is_removed(nvml, standin):
    gpu = nvml.gpu(standin.uuids[1])
    idle = gpu.clock_mhz()
    gpu.lock(1080)
    assert gpu.clock_mhz() == 1080
    assert standin.locked == [0, 1080, 0, 0]
    read = "from elastic.power.nvml import Nvml; import sys; print(Nvml().gpu(sys.argv[1]).clock_mhz())"
    done = subprocess.run([sys.executable, "-c", read, standin.uuids[1]], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "1080"
    gpu.unlock()
    assert gpu.clock_mhz() == idle == 135
    assert standin.locked == [0] * 4


@pytest.mark.parametrize("mhz", [0, 1, 1529, 1531, 100_000, -5])
def test_a_clock_outside_the_supported_list_is_refused_before_the_driver_is_asked(nvml, standin, mhz):
    error = refused(nvml.gpu(standin.uuids[0]).lock, mhz)
    assert error.condition == Condition.BAD_CLOCK.value
    assert "the nearest of its 21 clocks is" in str(error)
    assert standin.gpus[0].sets == 0


def test_work_follows_the_clock_and_uses_the_energy_of_the_power_model(nvml, standin):
    gpu, kind = nvml.gpu(standin.uuids[0]), GpuKind()

    def measured() -> tuple[float, float]:
        energy, began = gpu.energy_mj(), time.monotonic()
        with computing(gpu.uuid, seconds=0.06, beta=0.5):
            pass
        return time.monotonic() - began, (gpu.energy_mj() - energy) / 1000

    gpu.lock(1530)
    fast_s, fast_j = measured()
    gpu.lock(765)
    slow_s, slow_j = measured()
    assert fast_s >= 0.06
    assert slow_s >= 0.09  # 0.06 (0.5 x 2 + 0.5); a loaded machine may take longer, and then idles
    assert fast_j == pytest.approx(0.06 * (kind.static_w + kind.dynamic_w) + (fast_s - 0.06) * kind.idle_w, rel=0.03)
    assert slow_j == pytest.approx(0.09 * (kind.static_w + kind.dynamic_w / 8) + (slow_s - 0.09) * kind.idle_w, rel=0.03)


def test_the_power_limit_and_heat_throttle_and_say_so(nvml, standin):
    gpu, state = nvml.gpu(standin.uuids[0]), standin.gpus[0]
    gpu.lock(1530)
    state.power_limit_mw = 200_000
    state.busy_until = time.monotonic() + 60
    assert gpu.clock_mhz() == 1215  # the highest with 95 + 190 (f / 1530)^3 <= 200 W
    assert gpu.reasons() == {"power cap"}
    state.thermal_mhz = 900
    assert (gpu.clock_mhz(), gpu.reasons()) == (900, {"heat"})
    assert gpu.power_w() == pytest.approx(95 + 190 * (900 / 1530) ** 3, abs=0.01)


@pytest.mark.parametrize("code", sorted({value for name, value in vars(pynvml).items() if name.startswith("NVML_ERROR_")}))
def test_every_error_code_becomes_an_error_with_a_condition(nvml, standin, code):
    gpu = nvml.gpu(standin.uuids[0])
    standin.gpus[0].fails = code
    for call in (gpu.clock_mhz, gpu.power_w, gpu.energy_mj, gpu.unlock, gpu.name):
        if code == pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            continue
        error = refused(call)
        assert error.condition == condition_of(code).value
        assert standin.uuids[0] in str(error)


def test_conditions_of_the_codes_that_matter():
    assert {
        pynvml.NVML_ERROR_NO_PERMISSION: condition_of(4),
        pynvml.NVML_ERROR_NOT_SUPPORTED: condition_of(3),
        pynvml.NVML_ERROR_UNINITIALIZED: condition_of(1),
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: condition_of(12),
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: condition_of(13),
        pynvml.NVML_ERROR_GPU_IS_LOST: condition_of(15),
    } == {
        4: Condition.NO_PERMISSION,
        3: Condition.NOT_SUPPORTED,
        1: Condition.UNINITIALISED,
        12: Condition.NO_LIBRARY,
        13: Condition.NO_FUNCTION,
        15: Condition.LOST_GPU,
    }
    assert condition_of(123456) is Condition.UNKNOWN


def test_without_permission_reading_works_and_setting_says_what_to_do(nvml, standin):
    standin.gpus[0].may_set = NOBODY
    gpu = nvml.gpu(standin.uuids[0])
    assert gpu.power_w() == 55.0
    for call in (lambda: gpu.lock(1080), gpu.unlock):
        error = refused(call)
        assert error.condition == Condition.NO_PERMISSION.value
        assert "elastic power-daemon" in str(error)


def test_a_gpu_that_is_divided_into_instances_is_left_alone(nvml, standin):
    standin.gpus[0].mig = 1
    assert refused(nvml.gpu(standin.uuids[0]).lock, 1080).condition == Condition.MIG.value
    assert refused(nvml.gpu, "MIG-" + standin.uuids[0]).condition == Condition.MIG.value
    assert standin.gpus[0].sets == 0


def test_a_uuid_that_no_gpu_has(nvml):
    error = refused(nvml.gpu, "GPU-none")
    assert error.condition == Condition.NO_GPU.value
    assert "nvidia-smi -L" in str(error)


def test_a_lost_gpu_does_not_hide_the_others(nvml, standin):
    standin.gpus[1].fails = pynvml.NVML_ERROR_GPU_IS_LOST
    assert nvml.uuids() == [standin.uuids[0], *standin.uuids[2:]]
    assert refused(nvml.gpu, standin.uuids[1]).condition == Condition.LOST_GPU.value


def test_a_driver_that_vanishes(nvml, standin):
    gpu = nvml.gpu(standin.uuids[0])
    standin.state.gone = 1
    assert refused(gpu.power_w).condition == Condition.UNINITIALISED.value
    assert refused(Nvml).condition == Condition.NO_DRIVER.value
    assert Condition.UNINITIALISED.gone
    assert not Condition.PASSING.gone


def test_a_lock_of_somebody_else_is_noticed(nvml, standin):
    gpu = nvml.gpu(standin.uuids[0])
    assert gpu.locked_by_other() == ForeignLock(known=False)
    standin.gpus[0].busy_until = time.monotonic() + 60
    assert gpu.locked_by_other() == ForeignLock(known=True)
    standin.gpus[0].busy_until = 0
    for mhz in (1080, 1485, 630):
        standin.gpus[0].locked_min = standin.gpus[0].locked_max = mhz
        assert gpu.locked_by_other() == ForeignLock(known=True, mhz=mhz)


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_gpu_that_begins_or_ends_work_while_it_is_looked_at_is_not_locked(nvml, standin, monkeypatch, calls):
    """Its clock is that of idleness, and the reasons still are, or already are, those of work."""
    gpu, clock, reasons, done = nvml.gpu(standin.uuids[0]), Gpu.clock_mhz, Gpu.reasons, []

    def seen(read):
        def call(self):
            if len(done) == calls:
                busy = standin.gpus[0].busy_until
                standin.gpus[0].busy_until = 0 if busy else time.monotonic() + 60
            done.append(read)
            return read(self)

        return call

    monkeypatch.setattr(Gpu, "clock_mhz", seen(clock))
    monkeypatch.setattr(Gpu, "reasons", seen(reasons))
    for busy_until in (time.monotonic() + 60, 0):
        standin.gpus[0].busy_until = busy_until
        for patient in (False, True):
            done.clear()
            assert gpu.locked_by_other(patient=patient).mhz is None


def test_a_gpu_whose_clock_rises_while_it_is_looked_at_is_not_locked(nvml, standin, monkeypatch):
    monkeypatch.setattr(nvml_module, "_LOOK_S", 0.001)
    standin.gpus[0].busy_until = time.monotonic() + 60
    gpu, rising = nvml.gpu(standin.uuids[0]), iter([300, 600, 900, 1305])
    monkeypatch.setattr(Gpu, "clock_mhz", lambda self: next(rising))
    assert gpu.locked_by_other() == ForeignLock(known=True)
    monkeypatch.setattr(Gpu, "clock_mhz", lambda self: 600)
    assert gpu.locked_by_other() == ForeignLock(known=True, mhz=600)


@pytest.mark.parametrize(("least", "patient"), [(450, False), (450, True), (135, True)])
def test_a_range_that_somebody_has_locked_shows_as_more_than_one_clock(nvml, standin, monkeypatch, least, patient):
    """`nvidia-smi -lgc 450,990` on a GPU that computes and waits in turns; with 135, its idle clock, it says meanwhile that it is idle."""
    standin.gpus[0].locked_min, standin.gpus[0].locked_max = least, 990
    turns = itertools.cycle([time.monotonic() + 60, 0])

    def pause(_: float) -> None:
        standin.gpus[0].busy_until = next(turns)

    monkeypatch.setattr(nvml_module.time, "sleep", pause)
    assert nvml.gpu(standin.uuids[0]).locked_by_other(patient=patient) == ForeignLock(known=True, mhz=990)


def test_nothing_is_known_of_a_lock_while_a_gpu_does_not_compute(nvml, standin, monkeypatch):
    monkeypatch.setattr(nvml_module, "_LOOK_S", 0.001)
    gpu = nvml.gpu(standin.uuids[0])
    standin.gpus[0].locked_min, standin.gpus[0].locked_max = 135, 990
    assert [gpu.locked_by_other(patient=patient).known for patient in (False, True)] == [False, False]
    standin.gpus[0].busy_until, standin.gpus[0].thermal_mhz = time.monotonic() + 60, 900
    assert [gpu.locked_by_other(patient=patient).known for patient in (False, True)] == [False, False]


def test_a_gpu_that_runs_above_its_application_clock_is_not_locked(nvml, standin):
    standin.gpus[0].application_mhz, standin.gpus[0].boosts = 1305, 1
    standin.gpus[0].busy_until = time.monotonic() + 60
    gpu = nvml.gpu(standin.uuids[0])
    assert (gpu.clock_mhz(), gpu.usual_mhz()) == (1530, 1305)
    assert gpu.locked_by_other() == ForeignLock(known=True)


def test_a_negative_power_is_read_as_such(nvml, standin):
    standin.gpus[0].power_reads = NEGATIVE
    assert nvml.gpu(standin.uuids[0]).power_w() == -55.0


def ran(environment: dict[str, str], code: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("NVML_STANDIN", "LD_LIBRARY_PATH")}
    imports = "from elastic.errors import PowerError\nfrom elastic.power.nvml import Nvml"
    script = f"{imports}\ntry:\n    {code}\nexcept PowerError as error:\n    print(error.condition)"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**clean, **environment}, capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.strip()


@pytest.mark.long
def test_a_machine_without_the_library(tmp_path):
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")  # found first, where a machine has a real one
    assert ran({"LD_LIBRARY_PATH": str(tmp_path)}, "Nvml()") == Condition.NO_LIBRARY.value


@pytest.mark.long
def test_a_library_without_a_function(tmp_path):
    old = build(tmp_path, "-DWITHOUT_ENERGY")
    made = StandIn.made(tmp_path / "gpus", [GpuKind()])
    read = f"gpu = Nvml().gpu({made.uuids[0]!r}); print(gpu.power_w()); gpu.energy_mj()"
    assert ran(made.environment(old), read).split("\n") == ["55.0", Condition.NO_FUNCTION.value]
