"""Tests the messages that name the worker for which the others wait."""

from __future__ import annotations

import os
import signal
import subprocess

from elastic.host.process import is_stopped
from elastic.observe.activity import Doing
from elastic.observe.silence import COMPUTING_S, STOPPED_S, Silence, SilentWorker


def seen(worker: int, at: float, *, stopped: bool = False, phase: str = "backward") -> SilentWorker:
    doing = Doing(worker=worker, pid=70 + worker, phase=phase, step=7, epoch=1, at=at, micro_batch=3)
    return SilentWorker(worker=worker, pid=70 + worker, stopped=stopped, doing=doing)


def test_a_stopped_worker_is_named_once_within_seconds() -> None:
    silence = Silence()
    workers = [seen(0, 99.9, phase="ready"), seen(1, 99.0, stopped=True)]
    assert silence.sentences(workers, 100.0) == []
    (said,) = silence.sentences(workers, 100.0 + STOPPED_S)
    assert said == (
        "worker 1 (process 71) makes no progress: it has been in backward of step 7, micro-batch 3 for 3.0 s; "
        "its process is stopped, and the others wait for it"
    )
    assert silence.sentences(workers, 110.0) == []


def test_one_that_is_stopped_now_and_then_moves() -> None:
    silence = Silence()
    for second in range(10):
        assert silence.sentences([seen(1, 99.0 + second, stopped=True)], 100.0 + second) == []
        assert silence.stopped(1.0, 100.0 + second) == {}


def test_how_long_a_process_has_been_stopped() -> None:
    silence = Silence()
    for now in (100.0, 101.5, 103.0):
        silence.sentences([seen(0, 99.9), seen(1, 99.0, stopped=True)], now)
    assert silence.stopped(3.5, 103.0) == {}
    assert silence.stopped(3.0, 103.0) == {1: "its process has been stopped for 3.0 s, in backward of step 7, micro-batch 3"}
    silence.sentences([seen(0, 99.9), seen(1, 99.0)], 103.5)
    assert silence.stopped(3.0, 104.0) == {}, "it was continued"


def test_of_those_that_do_not_move_the_first_is_named() -> None:
    """The others wait for it, in what they entered later."""
    silence = Silence()
    workers = [seen(0, 100.2), seen(1, 100.1), seen(2, 100.3), seen(3, 90.0, phase="replicate")]
    assert silence.sentences(workers, 100.0 + COMPUTING_S) == []
    (said,) = silence.sentences(workers, 101.0 + COMPUTING_S)
    assert said.startswith("worker 1 (process 71) makes no progress: it has been in backward of step 7")


def test_who_left_no_word() -> None:
    silence, mute = Silence(), SilentWorker(worker=4, pid=74, stopped=True, doing=None)
    assert silence.sentences([mute], 5.0) == []
    assert silence.sentences([mute], 5.0 + STOPPED_S) == [
        "worker 4 (process 74) makes no progress: its process is stopped, and the others wait for it"
    ]


def test_whether_a_process_is_stopped() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_stopped(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)
    assert not is_stopped(None)
