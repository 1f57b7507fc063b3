"""Tests what is seen of processes: whether they run, sleep, or are stopped, and what they use, with their descendants."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic.agent import looking
from elastic.agent.looking import Looker
from elastic.agent.supervision import WorkerProcess
from elastic.health.evidence import Observed
from elastic.host.proc_files import ProcFiles
from elastic.observe.activity import AGENT, NOBODY, Activity

pytestmark = pytest.mark.slow

SPIN = "while True: pass"
SLEEP = "import time; time.sleep(60)"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])"


@contextmanager
def worker(code: str) -> Iterator[WorkerProcess]:
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        yield WorkerProcess(number=1, pid=process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(looker: Looker, process: WorkerProcess, holds: Callable[[Observed], bool]) -> Observed:
    deadline = time.monotonic() + 30.0
    while True:
        (seen,) = looker.look([process])
        if holds(seen):
            return seen
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)


def used(seen: Observed) -> float:
    assert seen.usage is not None
    return seen.usage.cpu_s


def test_one_that_computes(tmp_path: Path) -> None:
    with worker(SPIN) as process:
        seen = until(Looker(tmp_path), process, lambda seen: seen.usage is not None and seen.usage.ran_s > 0.5)
        assert seen.usage is not None
        assert seen.usage.running
        assert used(seen) >= 0.4
        assert not seen.stopped


def test_one_that_sleeps_and_is_stopped(tmp_path: Path) -> None:
    looker = Looker(tmp_path)
    with worker(SLEEP) as process:
        seen = until(looker, process, lambda seen: seen.usage is not None and "sleep" in seen.usage.wchan)
        assert seen.usage is not None
        assert (seen.state, seen.usage.running, seen.stopped) == ("S", False, False)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        until(looker, process, lambda seen: seen.stopped)
        os.kill(process.pid, signal.SIGCONT)
        until(looker, process, lambda seen: seen.state == "S")
    (gone,) = looker.look([process])
    assert (gone.state, gone.usage, gone.stopped) == ("", None, False)


def test_what_descendants_use_counts(tmp_path: Path) -> None:
    with worker(PARENT) as process:
        seen = until(Looker(tmp_path), process, lambda seen: seen.usage is not None and used(seen) - seen.usage.ran_s > 0.5)
        assert seen.usage is not None
        assert seen.usage.running


def test_a_moment_lasts_until_there_is_progress(tmp_path: Path) -> None:
    activity, looker, own = Activity(tmp_path, 1), Looker(tmp_path), WorkerProcess(number=1, pid=os.getpid())

    def look() -> Observed:
        (seen,) = looker.look([own])
        return seen

    first = look()
    assert (first.doing, first.waits_for) == (None, NOBODY), "it has done nothing in this job yet"
    activity.waits(AGENT)
    assert look().waits_for == AGENT
    activity.waits(None)
    moments = []
    for act in (
        lambda: activity.enter("forward", 3, 1, 2),
        lambda: activity.at("data loader"),
        lambda: activity.at("runtime"),
        lambda: activity.waits(4),
        lambda: activity.waits(None),
    ):
        act()
        activity.pulse()
        one, two = look(), look()
        assert one.moment == two.moment
        assert one.seen_at < two.seen_at
        moments.append(one.moment)
    assert len(set(moments)) == 5
    activity.close()


HOLDS = """
import ctypes, threading
def spin():
    while True: pass
for _ in range(4): threading.Thread(target=spin, daemon=True).start()
ctypes.PyDLL(None).sleep(60)  # keeps the interpreter lock
"""


@pytest.mark.parametrize(("code", "runs"), [(HOLDS, False), (SPIN, True)], ids=["polls", "computes"])
def test_threads_that_wait_for_the_interpreter_lock_do_not_run(code: str, runs: bool) -> None:
    """Each of them wakes every 5 ms to ask for it, and so is seen running now and then."""
    with worker(code) as process:
        assert process.pid is not None
        files = ProcFiles(process.pid)
        deadline = time.monotonic() + 30.0
        while looking._threads(files)[0] < 0.5 if runs else len(looking._threads(files, {})[3]) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        *_, before = looking._threads(files, {})
        seen = []
        for _ in range(10):
            time.sleep(0.2)
            _, running, _, before = looking._threads(files, before)
            seen.append(running)
        files.close()
        assert any(seen) == runs


def test_what_is_read_of_one_that_has_ended_stays_open_no_longer(tmp_path: Path) -> None:
    """Its last activity is asked for again when its death is recorded."""
    activity, looker, own = Activity(tmp_path, 1), Looker(tmp_path), WorkerProcess(number=1, pid=os.getpid())
    activity.enter("forward", 3, 1)
    before = len(os.listdir("/proc/self/fd"))
    looker.look([own])
    assert len(os.listdir("/proc/self/fd")) > before
    looker.forget(own)
    for _ in range(2):
        doing = looker.doing(own)
        assert doing is not None
        assert doing.phase == "forward"
        assert len(os.listdir("/proc/self/fd")) == before
    looker.look([WorkerProcess(number=1, pid=own.pid)])
    assert not looker._readers
    activity.close()


@pytest.mark.parametrize(("limit", "kept"), [(None, 5), (2, 0)])
def test_files_that_are_kept_open_leave_half_of_the_descriptors_to_others(
    limit: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.host.proc_files.process_limit", lambda _: limit)
    files, before = ProcFiles(os.getpid()), len(os.listdir("/proc/self/fd"))
    for name in ("stat", "io", "schedstat", "status", "limits"):
        assert files.read(name)
    assert len(os.listdir("/proc/self/fd")) == before + kept
    files.close()
