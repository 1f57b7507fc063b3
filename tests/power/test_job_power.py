"""Tests of the agent's thread for clocks and energy, with stand-in GPUs and without a job."""

from __future__ import annotations

import os
import time

import pytest

from elastic.errors import TrainerError
from elastic.plan.fleet import Fleet
from elastic.plan.planner import plan
from elastic.power.job_power import JobPower
from elastic.view import View
from elastic.worker.job import Job
from tests.power.test_cycle import view_of, workload

pytestmark = pytest.mark.slow


def viewed(workers: tuple[int, ...] = (0, 1)) -> View:
    work = workload()
    return view_of(plan(Fleet(workers=workers), work, None).plan, work)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def power(standin, tmp_path, monkeypatch, said):
    monkeypatch.setenv("ELASTIC_POWER_SOCKET", str(tmp_path / "no-daemon"))
    made = JobPower("a", "energy", tmp_path, said.append)
    yield made
    made.close()


def told(power: JobPower, said: list[str]) -> list[str]:
    """Returns what the user was told, once the thread has done all that it was given."""
    power.close()
    return said


def test_a_mode_without_gpus_is_said(power, said):
    power.committed(viewed())
    power.committed(viewed())
    (line,) = told(power, said)
    assert line.startswith('dvfs="energy" changes no clock: no worker has named its GPU; call job.use_gpu(uuid)')


def test_a_worker_that_names_no_gpu_is_said_once(power, said, standin):
    power.use(0, standin.uuids[0], os.getpid)
    power.committed(viewed())
    power.committed(viewed())
    (line,) = [line for line in told(power, said) if "use_gpu" in line]
    assert "worker 1 has not named its GPU" in line


def test_a_worker_may_name_its_gpu_again(power, said, standin):
    for _ in range(2):
        power.use(0, standin.uuids[0], os.getpid)
    power.use(1, standin.uuids[1], os.getpid)
    power.committed(viewed())
    assert told(power, said) == []


def test_nothing_is_kept_for_a_thread_that_has_ended(power, said, standin):
    standin.state.gone = 1
    power.use(0, standin.uuids[0], os.getpid)
    assert power._thread is not None
    power._thread.join(20)
    left = power._todo.qsize()
    progress = {"step": 1, "epoch": 1, "committed_at": time.monotonic(), "effort": [0.1, 0.0, 0.1]}
    assert power.heard(0, progress) == progress
    power.ended(0)
    assert power._todo.qsize() == left
    assert "the energy of GPUs is not measured" in said[0]


def test_measuring_needs_no_gpu(tmp_path, said):
    power = JobPower("a", None, tmp_path, said.append)
    power.committed(viewed())
    assert told(power, said) == []


@pytest.mark.long
def test_a_new_workers_gpu_that_is_lost_gives_all_clocks_back(power, said, standin):
    view = viewed()
    for worker in view.workers:
        power.use(worker, standin.uuids[worker], os.getpid)
    power.committed(view)
    power._post(lambda: power._set(power._devices[0], 1080))
    until = time.monotonic() + 30
    while not standin.locked[0] and time.monotonic() < until:
        time.sleep(0.01)  # the guardian's doing
    assert standin.locked[0] == 1080
    standin.gpus[3].fails = 15
    power.use(2, standin.uuids[3], os.getpid)
    while standin.locked[0] and time.monotonic() < until:
        time.sleep(0.01)
    assert standin.locked == [0] * 4
    (line,) = [line for line in told(power, said) if "lost GPU" in line]
    assert line.startswith("worker 2: GPU ")
    assert line.endswith("and no clock is set")


@pytest.mark.parametrize("uuid", ["", "0", 0, None, ["GPU-1"], "cuda:0", "GPU-\ud800"])
def test_a_gpu_is_named_by_its_uuid(uuid):
    with pytest.raises(TrainerError, match="`nvidia-smi -L` prints it"):
        Job.use_gpu(object.__new__(Job), uuid)
