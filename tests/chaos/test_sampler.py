"""Tests that the watcher of a job goes on when a log cannot be read, and that a watch that broke says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.chaos.hosts import Host
from elastic.chaos.running import RunningJob
from elastic.chaos.sampler import Sampler
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


def test_a_watch_that_breaks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def look(*_: object) -> None:
        raise ZeroDivisionError("a defect of the harness")

    monkeypatch.setattr(Sampler, "_look", look)
    sampler = watched(tmp_path, lambda sampler: sampler.seen.broken)
    assert "ZeroDivisionError: a defect of the harness" in str(sampler.seen.broken)
