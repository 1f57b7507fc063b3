"""Tests what is read of a GPU's faults, and that it is in the incident of the worker whose GPU it was."""

from __future__ import annotations

import json
import os
import signal

import pytest

from elastic.errors import PowerError
from elastic.observe.gpu_health import GpuHealth
from elastic.observe.incident import Incident, timeline
from elastic.power.gpu_faults import GpuFaults, counters
from tests.power.test_closed_loop import Training


def test_counters_are_read_before_and_after(standin, nvml):
    faults = GpuFaults()
    standin.gpus[1].ecc_corrected, standin.gpus[1].remapped = 3, 1
    standin.xid(1, 31)  # before the worker began
    faults.begin(7, nvml.gpu(standin.uuids[1]))
    assert faults.of(7) is None
    standin.gpus[1].ecc_corrected, standin.gpus[1].ecc_uncorrected = 5, 2
    standin.gpus[1].retired[1] = 1
    standin.xid(1, 48)
    faults.look()
    standin.xid(1, 63)
    standin.xid(0, 79)  # of another one
    faults.end(7)
    found = faults.of(7)
    assert found is not None
    assert found.before == {"ecc_corrected": 3, "ecc_uncorrected": 0, "retired_pages": 0, "remapped_rows": 1}
    assert found.after == {"ecc_corrected": 5, "ecc_uncorrected": 2, "retired_pages": 1, "remapped_rows": 1}
    assert found.xids == (48, 63)
    assert str(found) == (
        f"GPU {standin.uuids[1]} of worker 7: Xid 48, 63; corrected ECC errors 3 -> 5; uncorrected ECC errors 0 -> 2; retired pages 0 -> 1"
    )
    assert GpuHealth.from_json(json.loads(json.dumps(found.to_json()))) == found
    faults.close()


def test_the_next_worker_of_a_gpu_has_only_what_happened_since(standin, nvml):
    faults, gpu = GpuFaults(), nvml.gpu(standin.uuids[0])
    faults.begin(0, gpu)
    standin.xid(0, 79)
    faults.end(0)
    faults.begin(1, gpu)
    faults.end(1)
    assert (faults.of(0).xids, faults.of(1).xids) == ((79,), ())
    assert not faults.of(1).notable
    assert str(faults.of(1)).endswith("no counter has changed")
    faults.close()


def test_what_a_gpu_does_not_have_is_absent(standin, nvml):
    standin.gpus[0].no_ecc = standin.gpus[0].no_xids = 1
    faults, gpu = GpuFaults(), nvml.gpu(standin.uuids[0])
    assert counters(gpu) == {}
    faults.begin(0, gpu)
    standin.xid(0, 79)
    faults.end(0)
    assert (faults.of(0).before, faults.of(0).after, faults.of(0).xids, faults.of(0).notable) == ({}, {}, None, False)
    faults.end(5)
    assert faults.of(5) is None
    faults.close()


def test_a_gpu_that_does_not_answer_any_more_is_said_to(standin, nvml):
    faults, gpu = GpuFaults(), nvml.gpu(standin.uuids[0])
    faults.begin(0, gpu)
    standin.gpus[0].fails = 15
    with pytest.raises(PowerError):
        counters(gpu)
    faults.end(0)
    assert faults.of(0).after == {}
    assert "lost GPU" in faults.of(0).unreadable
    assert faults.of(0).notable
    faults.close()


def test_an_incident_keeps_them():
    health = GpuHealth(worker=1, gpu="GPU-1", before={"ecc_uncorrected": 0}, after={"ecc_uncorrected": 1}, xids=(48,))
    well = GpuHealth(worker=2, gpu="GPU-2", xids=())
    incident = Incident(kind="death", worker=1, also=(2,), gpus=(health, well))
    assert Incident.from_json(json.loads(json.dumps(incident.to_json()))) == incident
    assert "GPU GPU-1 of worker 1: Xid 48; uncorrected ECC errors 0 -> 1" in timeline(incident)
    assert "GPU-2" not in timeline(incident)


@pytest.mark.slow
@pytest.mark.long
def test_the_incident_of_a_worker_has_the_faults_of_its_gpu(standin, tmp_path):
    def break_one(training: Training) -> None:
        """The GPU of the last worker reports an error that ends its process."""
        if training.until(lambda: training.energy.get("stages")):
            standin.gpus[1].ecc_uncorrected = standin.gpus[0].ecc_uncorrected = 1
            standin.xid(0, 48)
            standin.xid(1, 48)
            os.kill(training.members["members"][-1]["pid"], signal.SIGKILL)

    result = Training(standin, tmp_path / "a", steps=60).run("off", break_one)
    (death,) = [found for found in result.incidents if found["kind"] == "death"]
    (health,) = death["gpus"]
    assert health["worker"] == death["worker"]
    assert health["gpu"] in standin.uuids
    assert (health["before"]["ecc_uncorrected"], health["after"]["ecc_uncorrected"], health["xids"]) == (0, 1, [48])
