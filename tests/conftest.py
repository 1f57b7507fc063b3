"""Shared fixtures: a job must leave nothing behind, however it ended."""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# The duration of an example means nothing on a shared machine.
patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("same", patient, derandomize=True)  # the same examples each time: a failure is the change's
hypothesis.settings.register_profile("random", patient)  # new examples each time: `make test-all`
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_configure() -> None:
    """A suite started in the background has SIGINT ignored, and under `nohup` SIGHUP: it would hand that down to the jobs that it tests."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass(frozen=True)
class Leftovers:
    """What the jobs of one test leave. All their processes inherit a unique TMPDIR, by which they are found."""

    directory: Path

    def processes(self) -> dict[int, str]:
        """Live processes of the test's jobs, etcd and what train functions started included: command line by pid."""
        mark = f"TMPDIR={self.directory}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
        found.pop(os.getpid(), None)
        return found

    def files(self) -> list[str]:
        return sorted(entry.name for entry in self.directory.iterdir())

    def wait(self, seconds: float) -> None:
        """Until every process has ended, at most this long."""
        deadline = time.monotonic() + seconds
        while (running := self.processes()) and (rest := deadline - time.monotonic()) > 0:
            with suppress(ProcessLookupError):
                wait_for_end(next(iter(running)), rest)


def wait_for_end(pid: int, seconds: float) -> bool:
    """Whether the process ended within this time. Raises ProcessLookupError if there is none."""
    pidfd = os.pidfd_open(pid)
    try:
        return bool(select.select([pidfd], [], [], max(0.0, seconds))[0])
    finally:
        os.close(pidfd)


@contextmanager
def no_file_may_have_more_than(size: int) -> Iterator[None]:
    """As on a disk that becomes full: a write writes what there is room for, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def leftovers(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leftovers]:
    """Fails the test if, soon after it, a process or a temporary file of its jobs is left; removes what is."""
    tmp_path_factory.getbasetemp()  # pytest's own directory, made before TMPDIR changes
    directory = Path(tempfile.mkdtemp(prefix="elastic-test-"))
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    left = Leftovers(directory)
    try:
        yield left
        left.wait(3.0)
        assert left.processes() == {}, "processes of the job are left"
        assert left.files() == [], "temporary files of the job are left"
    finally:
        for pid in left.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        left.wait(3.0)
        shutil.rmtree(directory, ignore_errors=True)
