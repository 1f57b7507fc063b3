from __future__ import annotations

from typing import Any

import pytest

from elastic.agent.supervision import WorkerProcess, ended, how_ended, is_consequence, is_machine_failure, last_line, worker_error


@pytest.fixture
def worker() -> WorkerProcess:
    return WorkerProcess(number=3, pid=77)


def report(**change: Any) -> dict[str, Any]:
    return {"kind": "ValueError", "ours": False, "message": "m", "traceback": "Traceback: m\n", "epoch": 2, "step": 9, **change}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "JobFailed"),
        ({"kind": "TrainerError", "ours": True}, "TrainerError"),
        ({"kind": "TrainerError", "ours": False}, "JobFailed"),
        ({"kind": "NonFinite", "ours": True}, "JobFailed"),
        ({"kind": "Unknown", "ours": True}, "JobFailed"),
    ],
)
def test_wrong_arguments_keep_their_class_and_all_else_is_a_failed_job(worker: WorkerProcess, change: dict[str, Any], kind: str) -> None:
    outcome = worker_error(worker, report(**change))
    assert outcome == {"type": "failed", "kind": kind, "message": "worker 3 failed in epoch 2, step 9\n\nTraceback: m"}


def test_without_a_traceback_the_message_says_it_all(worker: WorkerProcess) -> None:
    assert worker_error(worker, report(traceback=""))["message"] == "m"


def test_before_the_first_step_no_step_is_named(worker: WorkerProcess) -> None:
    assert worker_error(worker, report(step=None))["message"].startswith("worker 3 failed\n")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (-9, "was killed by SIGKILL in epoch 1, step 4"),
        (-11, "was killed by SIGSEGV in epoch 1, step 4"),
        (0, "exited with code 0 inside train_fn in epoch 1, step 4"),
        (3, "exited with code 3 inside train_fn in epoch 1, step 4"),
    ],
)
def test_a_silent_end_says_how_and_where(worker: WorkerProcess, status: int, said: str) -> None:
    worker.status, worker.epoch, worker.step = status, 1, 4
    assert ended(worker) == {"type": "failed", "kind": "JobFailed", "message": f"worker 3 (process 77) {said}"}


def test_a_lost_link_is_a_consequence_and_a_bug_is_not() -> None:
    assert is_consequence("PeerLost")
    assert not is_consequence("ValueError")


def test_one_that_we_ended_or_that_said_why_is_described_so(worker: WorkerProcess) -> None:
    worker.kill("lost by 0")
    worker.status = -9
    assert how_ended(worker) == "worker 3 (process 77) was ended"
    worker.failure = "MemoryError: no room"
    assert how_ended(worker) == "worker 3 (process 77) failed with MemoryError: no room"


def test_of_several_hosts_it_names_the_one(worker: WorkerProcess) -> None:
    worker.status, worker.host, worker.epoch, worker.step = -9, "vm-1a", 2, 4
    assert how_ended(worker) == "worker 3 (process 77 on vm-1a) was killed by SIGKILL in epoch 2, step 4"
    worker.lost = "vm-1a: its connection ended"
    assert how_ended(worker) == "worker 3 (process 77) was lost in epoch 2, step 4 with its host vm-1a: its connection ended"
    worker.pid, worker.step = None, None
    assert how_ended(worker) == "worker 3 was lost with its host vm-1a: its connection ended"


@pytest.mark.parametrize(
    ("change", "machine"),
    [
        ({}, False),
        ({"kind": "MemoryError"}, True),
        ({"kind": "OutOfMemoryError"}, True),
        ({"kind": "RuntimeError", "message": "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"}, True),
        ({"kind": "RuntimeError", "message": "shapes differ"}, False),
    ],
)
def test_only_memory_and_devices_are_the_machines_fault(change: dict[str, Any], machine: bool) -> None:
    assert is_machine_failure(report(**change)) == machine


def test_the_last_line_says_most() -> None:
    assert last_line(report(traceback="Traceback:\n  here\nValueError: m\n")) == "ValueError: m"
    assert last_line(report(traceback="")) == "m"
    assert last_line(report(traceback="", message="")) == "ValueError"
