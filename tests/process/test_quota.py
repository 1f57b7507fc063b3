"""Tests whether the quota of a control group keeps a process from running: with files that a kernel would write, and with a real group."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from elastic.host.quota import Quotas


class Machine:
    """Files as of control groups, version 2 or 1, and of one process."""

    def __init__(self, folder: Path, name: str, group: str) -> None:
        self.groups, self.processes = folder / "groups", folder / "proc"
        self.group = self.groups / group
        self.group.mkdir(parents=True)
        (self.processes / "7").mkdir(parents=True)
        (self.processes / "7" / "cgroup").write_text(name)

    def now(self, periods: int, used_up: int, waited_s: float, folder: Path | None = None) -> None:
        stat = f"usage_usec 5\nnr_periods {periods}\nnr_throttled {used_up}\nthrottled_usec 1\n"
        ((folder or self.group) / "cpu.stat").write_text(stat)
        (self.processes / "7" / "schedstat").write_text(f"1000 {int(waited_s * 1e9)} 3\n")

    def quotas(self) -> Quotas:
        return Quotas(groups=self.groups, processes=self.processes)


@pytest.fixture(params=[("0::/a/b\n", "a/b"), ("2:cpuset:/\n1:cpu,cpuacct:/a/b\n0::/\n", "cpu,cpuacct/a/b")], ids=["v2", "v1"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path, *request.param)


def test_one_that_waits_while_its_quota_is_used_up_is_held(machine: Machine) -> None:
    quotas = machine.quotas()
    machine.now(10, 9, 1.0)
    assert quotas.held(7, 100.0) == 0.0
    machine.now(20, 18, 2.8)
    assert quotas.held(7, 100.5) == 0.0, "it is too early to say"
    assert quotas.held(7, 102.0) == pytest.approx(0.9)
    assert quotas.held(7, 102.4) == pytest.approx(0.9)
    machine.now(30, 18, 4.6)
    assert quotas.held(7, 104.0) == 0.0, "others were faster, and the quota was not used up"
    machine.now(40, 28, 4.6)
    assert quotas.held(7, 106.0) == 0.0, "it did not want to run"


def test_the_quota_of_a_group_around_it_counts_too(machine: Machine) -> None:
    quotas = machine.quotas()
    machine.now(0, 0, 0.0)
    machine.now(10, 0, 0.0, machine.group.parent)
    assert quotas.held(7, 1.0) == 0.0
    machine.now(20, 10, 1.5, machine.group.parent)
    assert quotas.held(7, 3.0) == pytest.approx(0.75)


def test_without_a_quota_or_a_process_nothing_is_held(machine: Machine) -> None:
    quotas = machine.quotas()
    (machine.group / "cpu.stat").write_text("usage_usec 5\n")
    assert [quotas.held(7, at) for at in (1.0, 3.0, 5.0)] == [0.0] * 3
    assert [quotas.held(pid, 1.0) for pid in (None, 8)] == [0.0, 0.0]
    (machine.group / "cpu.stat").write_text("nonsense\n")
    assert quotas.held(7, 7.0) == 0.0
    quotas.forget(7)
    quotas.forget(None)


@contextmanager
def group_with_quota(used_us: int, period_us: int) -> Iterator[Path]:
    """A control group of this machine with a quota of processor time. Skips where none can be made."""
    for top, version in ((Path("/sys/fs/cgroup/cpu"), 1), (Path("/sys/fs/cgroup/cpu,cpuacct"), 1), (Path("/sys/fs/cgroup"), 2)):
        folder = top / f"elastic-test-{os.getpid()}"
        try:
            folder.mkdir()
            if version == 2:
                (folder / "cpu.max").write_text(f"{used_us} {period_us}")
            else:
                (folder / "cpu.cfs_period_us").write_text(str(period_us))
                (folder / "cpu.cfs_quota_us").write_text(str(used_us))
        except OSError:
            with suppress(OSError):
                folder.rmdir()
            continue
        try:
            yield folder
        finally:
            leave(folder)
        return
    pytest.skip("no control group with a quota of processor time can be made here")


def leave(folder: Path) -> None:
    """Removes a group once its processes are gone; those that are left go to the group around it."""
    deadline = time.monotonic() + 5.0
    while folder.exists() and time.monotonic() < deadline:
        for pid in (folder / "cgroup.procs").read_text().split():
            with suppress(OSError):
                (folder.parent / "cgroup.procs").write_text(pid)
        with suppress(OSError):
            folder.rmdir()


@pytest.mark.slow
@pytest.mark.long
def test_a_real_group_holds_a_process_that_computes_and_none_that_sleeps() -> None:
    with group_with_quota(20_000, 200_000) as folder:
        busy, idle = (subprocess.Popen([sys.executable, "-c", code]) for code in ("while True: pass", "import time; time.sleep(60)"))
        try:
            for each in (busy, idle):
                (folder / "cgroup.procs").write_text(str(each.pid))
            quotas, deadline = Quotas(), time.monotonic() + 20.0
            while quotas.held(busy.pid, time.monotonic()) < 0.6:
                assert quotas.held(idle.pid, time.monotonic()) < 0.3
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            for each in (busy, idle):
                each.kill()
                each.wait()
