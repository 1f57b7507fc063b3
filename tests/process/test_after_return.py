"""Tests the checks after `train_fn` has returned."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import elastic
from elastic.errors import TrainFunctionError
from elastic.worker.after_return import check_value, tell_of_lasting_threads


@pytest.mark.parametrize("value", [None, 1.5, "a", [1, (2, {"a": {"b": [None]}})], {"losses": [1.0], "": {}}])
def test_what_json_keeps_may_be_returned(value: Any) -> None:
    check_value(value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({1: "a"}, r"a dict with the key 1, which JSON"),
        ({"a": [0, ({None: 1},)]}, r"a dict with the key None, which JSON"),
        ([{True: 1}], r"a dict with the key True, which JSON"),
        ({(1, 2): 3}, r"returned a dict that cannot be sent to the launcher as JSON \(keys must be"),
        ({"a": {1, 2}}, r"returned a dict that cannot be sent to the launcher as JSON \(Object of type set"),
    ],
)
def test_what_json_would_change_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(TrainFunctionError, match=reason):
        check_value(value)


def test_threads_that_last_are_named_and_others_are_not() -> None:
    told: queue.Queue[list[str]] = queue.Queue()
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait, name=name, daemon=name == "daemon") for name in ("daemon", "lasts")]
    for thread in threads:
        thread.start()
    try:
        tell_of_lasting_threads(told.put, 0.01)
        names = told.get(timeout=10.0)
    finally:
        stop.set()
    assert "lasts" in names
    assert not {"daemon", "MainThread", "elastic-lasting"} & set(names)


def train(job: Any) -> int:
    pool = ThreadPoolExecutor(1)  # its thread is idle, and ends with the process
    pool.submit(time.monotonic).result()
    if job.worker == 1:
        threading.Thread(target=time.sleep, args=(1000.0,), name="never ends").start()
    return job.worker


@pytest.mark.slow
@pytest.mark.long
def test_a_thread_that_never_ends_is_named_by_the_job(capfd: pytest.CaptureFixture[str]) -> None:
    assert elastic.run(train, workers=2).value == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "thread" in line]
    assert len(said) == 1
    assert "worker 1 has returned from train_fn and waits for threads that train_fn started and did not end: never ends." in said[0]
