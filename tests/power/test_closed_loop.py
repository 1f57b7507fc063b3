"""Tests of jobs whose layers occupy stand-in GPUs: clocks are set, kept, restored, and change no bit."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import elastic
from elastic.errors import JobFailed, SettingsError
from elastic.power.keeper import restore_left
from examples.nvml_standin import NOBODY, StandIn

TRAIN = f"{Path(__file__).parents[2] / 'examples' / 'dvfs_training.py'}:train"
pytestmark = pytest.mark.slow


class Training:
    """A job in a mode. `meanwhile` runs in a thread, with a predicate that waits, until the job ends."""

    def __init__(self, standin: StandIn, directory: Path, **options) -> None:
        self.standin, self.run_directory, self.over = standin, directory / "run", threading.Event()
        (directory / "claims").mkdir(parents=True)
        self.options = {"uuids": standin.uuids, "directory": str(directory / "claims"), "layers": 5, "width": 8, "seconds": 0.002}
        self.options |= {"beta": 1.0, "steps": 90, "micro_batches": 8, **options}

    def run(self, mode: str, meanwhile: Callable[[Training], None] | None = None, workers: int = 2) -> elastic.JobResult:
        thread = threading.Thread(target=lambda: meanwhile and meanwhile(self), daemon=True)
        thread.start()
        try:
            return elastic.run(
                TRAIN, workers=workers, stages=workers, args=[self.options], dvfs=mode, directory=self.run_directory, rebalance=False
            )
        finally:
            self.over.set()
            thread.join()

    def until(self, what: Callable[[], object]) -> bool:
        """Waits for something that other processes do; False if the job ends before."""
        while not what():
            if self.over.wait(0.01):
                return False
        return True

    @property
    def energy(self) -> dict:
        try:
            return json.loads((self.run_directory / "energy.json").read_text())
        except (OSError, ValueError):
            return {}

    @property
    def members(self) -> dict:
        return json.loads((self.run_directory / "members.json").read_text())

    def locked(self) -> bool:
        return any(self.standin.locked)


@pytest.mark.long
def test_without_permission_one_line_says_what_to_do_and_the_training_goes_on(standin, tmp_path, capfd):
    for gpu in standin.gpus:
        gpu.may_set = NOBODY
    training = Training(standin, tmp_path / "a", steps=12, seconds=0.001, micro_batches=2)
    result = training.run("energy")
    told = [line for line in capfd.readouterr().err.splitlines() if "clock" in line]
    assert result.value[0]
    assert len(told) == 1, told
    assert "start `elastic power-daemon` as root" in told[0]
    assert sum(gpu.sets for gpu in standin.gpus) == 0


@pytest.mark.long
@pytest.mark.parametrize("least", [135, 450])
def test_a_range_that_an_operator_has_locked_stays_and_one_line_names_it(standin, tmp_path, capfd, least):
    standin.gpus[0].locked_min, standin.gpus[0].locked_max = least, 990
    result = Training(standin, tmp_path / "a").run("energy")
    told = [line for line in capfd.readouterr().err.splitlines() if "clock" in line]
    assert result.value[0]
    assert len(told) == 1, told
    assert re.search(rf"GPU {standin.uuids[0]} is locked to ({least}|990) MHz by somebody else", told[0])
    assert (standin.gpus[0].locked_min, standin.gpus[0].locked_max, standin.gpus[0].resets) == (least, 990, 0)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["speed", "energy"])
def test_clocks_change_no_bit_and_come_back_although_a_worker_is_killed(standin, tmp_path, mode):
    def kill(training: Training) -> None:
        if training.until(training.locked):
            os.kill(training.members["members"][-1]["pid"], signal.SIGKILL)

    training = Training(standin, tmp_path / mode)
    result = training.run(mode, kill)
    assert max(gpu.sets for gpu in standin.gpus) >= 2
    assert any(incident["kind"] == "death" for incident in result.incidents)
    assert standin.locked == [0] * 4
    plain = Training(standin, tmp_path / "off", seconds=0.0).run("off")
    assert plain.value == result.value
    assert restore_left(tmp_path / "clocks") == ([], [])


@pytest.mark.long
def test_an_agent_that_is_killed_leaves_no_clock(standin, tmp_path):
    def kill(training: Training) -> None:
        if training.until(training.locked):
            os.kill(training.members["agent"], signal.SIGKILL)

    training = Training(standin, tmp_path / "a")
    with pytest.raises(JobFailed):
        training.run("energy", kill)
    until = time.monotonic() + 5
    while any(standin.locked) and time.monotonic() < until:
        time.sleep(0.01)  # the guardian's doing
    assert standin.locked == [0] * 4


@pytest.mark.long
def test_a_driver_that_vanishes_ends_the_measuring_and_not_the_training(standin, tmp_path, capfd):
    def vanish(training: Training) -> None:
        if training.until(training.locked):
            standin.state.gone = 1

    training = Training(standin, tmp_path / "a")
    assert training.run("energy", vanish).value[0]
    told = capfd.readouterr().err
    assert "the energy of worker" in told
    assert "no clock is" in told
    assert "a clock is not restored" in told
    standin.state.gone = 0
    restored, complaints = restore_left(tmp_path / "clocks")
    assert complaints == []
    assert standin.locked == [0] * 4
    assert restored


@pytest.mark.long
def test_a_gpu_that_an_operator_has_locked_is_left_alone(standin, tmp_path, capfd):
    for gpu in standin.gpus:
        gpu.locked_min = gpu.locked_max = 1215
    assert Training(standin, tmp_path / "a", steps=40).run("energy").value[0]
    assert "locked to 1215 MHz by somebody else" in capfd.readouterr().err
    assert standin.locked == [1215] * 4


@pytest.mark.long
def test_energy_is_measured_without_a_mode_and_shown(standin, tmp_path, capsys):
    from typer.testing import CliRunner

    from elastic.cli.main import app

    training = Training(standin, tmp_path / "a", steps=60)
    training.run("off")
    assert sum(gpu.sets for gpu in standin.gpus) == 0
    shown = CliRunner().invoke(app, ["energy", str(training.run_directory), "--json"])
    found = json.loads(shown.output)
    assert (shown.exit_code, found["mode"]) == (0, "off")
    assert found["now"]["joules"] == pytest.approx(sum(stage["joules"] for stage in found["stages"]))
    idle = sum(gpu.idle_w for gpu in standin.gpus[:2]) * found["now"]["step_s"]
    assert idle < found["now"]["joules"] < 6 * idle
    assert "J a step" in CliRunner().invoke(app, ["energy", str(training.run_directory)]).output
    nothing = CliRunner().invoke(app, ["energy", str(training.run_directory), "--svg", str(tmp_path / "x.svg")])
    assert nothing.exit_code == 1


def test_a_wrong_mode_and_several_hosts_are_refused():
    with pytest.raises(SettingsError, match="dvfs='fast': use one of off, speed, energy"):
        elastic.run(TRAIN, workers=1, dvfs="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match="dvfs='energy' is for jobs on one host"):
        elastic.run(TRAIN, workers=1, dvfs="energy", secret="0" * 32, etcd="127.0.0.1:1")
