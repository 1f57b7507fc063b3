"""Tests that the watcher of a job goes on when a log cannot be read, and that a watch that broke says so."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.chaos.hosts import Host, tree_cpu_s
from elastic.chaos.running import RunningJob
from elastic.chaos.sampler import Sampler, _descriptors
from elastic.chaos.schedule import JobSpec, Schedule


def watched(folder: Path, met: Callable[[Sampler], Any]) -> Sampler:
    """The watcher of a job of one host whose run directory is `folder`, closed when the condition is met."""
    job = RunningJob(schedule=Schedule(job=JobSpec(), injections=()), folder=folder)
    living: Any = SimpleNamespace(poll=lambda: None, pid=0)
    job.hosts.append(Host(0, folder, folder, living))
    sampler, deadline = Sampler(job), time.monotonic() + 10.0
    while not met(sampler):
        assert time.monotonic() < deadline, "it did not come"
        threading.Event().wait(0.001)
    sampler.close()
    return sampler


def test_a_log_of_incidents_that_cannot_be_read_is_noted_once_and_the_watch_goes_on(tmp_path: Path):
    (tmp_path / "incidents.jsonl").write_text('{"kind": "death"}\n{"kind": "dea{"kind": "death"}\n')
    seen = watched(tmp_path, lambda sampler: sampler.seen.unreadable and sampler.seen.looks > 40).seen
    assert len(seen.unreadable) == 1
    assert "incidents.jsonl, line 2, is not JSON" in seen.unreadable[0]
    assert seen.broken is None


RECORD = """
import sys
from elastic.observe.activity import Activity
activity = Activity(sys.argv[1], 1)
activity.enter("forward", 3, 1)
sys.stdin.read()
"""


@pytest.mark.slow
def test_records_of_workers_that_have_ended_are_not_read_again_and_again(tmp_path: Path):
    (tmp_path / "activity").mkdir()
    with subprocess.Popen([sys.executable, "-c", RECORD, str(tmp_path)], stdin=subprocess.PIPE) as worker:

        def dropped(sampler: Sampler) -> bool:
            if sampler.step == 3:
                worker.kill()
            return sampler.highest == 3 and not sampler._readers

        seen = watched(tmp_path, dropped).seen
    assert seen.read > 0
    assert seen.broken is None


def test_a_watch_that_breaks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def look(*_: object) -> None:
        raise ZeroDivisionError("a defect of the harness")

    monkeypatch.setattr(Sampler, "_look", look)
    sampler = watched(tmp_path, lambda sampler: sampler.seen.broken)
    assert "ZeroDivisionError: a defect of the harness" in str(sampler.seen.broken)


def test_descriptors_are_counted_without_files_of_proc_but_of_processes_that_have_ended():
    before = _descriptors(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as child:
        pidfd = os.pidfd_open(child.pid)
        with Path(f"/proc/{child.pid}/stat").open(), Path("/proc/stat").open(), Path(__file__).open():
            opened = {"descriptors": before["descriptors"] + 2, "watched": before["watched"] + 1}
            assert _descriptors(os.getpid()) == before | opened
            child.kill()
            child.wait()
            assert _descriptors(os.getpid()) == before | opened | {"stale": before["stale"] + 1}
        os.close(pidfd)
    assert _descriptors(os.getpid()) == before


@pytest.mark.slow
def test_processor_time_of_the_harness_has_that_of_children_and_of_those_that_have_ended():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(6_000_000))']); print(1, flush=True); sys.stdin.read()"
    before = tree_cpu_s(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        used = tree_cpu_s(os.getpid()) - before
        child.kill()
    assert 0.05 < tree_cpu_s(os.getpid()) - before < used + 0.2, "those of a child that was waited for count on"
    assert used > 0.05, "the child, and its child, which has ended"
