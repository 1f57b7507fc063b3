"""Tests what the harness does with a host's process that has ended: start it again as a scheduler would, or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from elastic.chaos import gather, running
from elastic.chaos.hosts import Host
from elastic.chaos.running import RunningJob
from elastic.chaos.schedule import JobSpec, Schedule

Usage = namedtuple("Usage", "free")


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


@pytest.mark.parametrize(
    ("code", "free", "later", "again"),
    [
        (0, 1 << 30, 0.0, False),
        (1, 1 << 30, 0.0, False),
        (75, 1 << 30, 0.0, True),
        (3, 1 << 30, 0.0, False),
        (3, 0, 0.0, True),
        (3, 0, 5.0, True),
        (3, 0, 60.0, False),
        (2, 0, 0.0, False),
    ],
)
def test_it_is_started_again_where_a_scheduler_would(
    code: int, free: int, later: float, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has so much room; the host ends so many seconds after that was seen."""
    now = [100.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
    job = RunningJob(schedule=Schedule(job=JobSpec(), injections=(), seed=0), folder=tmp_path)
    new: Any = Ended(0)
    monkeypatch.setattr(job, "_launched", lambda *_: new)
    job.supervise()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30 if later else free))
    now[0] += later
    process: Any = Ended(code)
    host = Host(0, tmp_path, tmp_path, process)
    job.hosts.append(host)
    job.supervise()
    assert (host.codes, host.process is new, host.expected) == ([code], again, not again)


def test_the_folder_of_an_interrupted_run_is_removed_when_its_processes_have_ended(tmp_path: Path) -> None:
    """The process makes a folder again and again for a while, and one that is removed too."""
    temporary = tmp_path / "run" / "tmp"
    temporary.mkdir(parents=True)
    code = "import os, sys, time\nends = time.monotonic() + 0.1\nwhile time.monotonic() < ends: os.makedirs(sys.argv[1], exist_ok=True)"
    with subprocess.Popen([sys.executable, "-S", "-c", code, str(temporary / "made")], env={**os.environ, "TMPDIR": str(temporary)}):
        gather.remove(tmp_path / "run", temporary)
    assert not (tmp_path / "run").exists()
