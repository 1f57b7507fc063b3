from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic.errors import Conflict, ElasticError, EtcdRefused, EtcdUnavailable, JobFailed, NameLost, SettingsError
from elastic.membership import etcd_thread as module
from elastic.membership.etcd_thread import EtcdTask, EtcdThread


@pytest.fixture
def posted() -> queue.SimpleQueue[Callable[[], None]]:
    return queue.SimpleQueue()


@pytest.fixture
def said() -> list[Any]:
    return []


@pytest.fixture
def etcd_thread(posted: queue.SimpleQueue[Callable[[], None]], said: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[EtcdThread]:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    made = EtcdThread(posted.put, lambda error, *_: said.append(str(error)), lambda: said.append("back"), said.append)
    yield made
    made.stop()


def failing(times: int, error: Exception) -> Callable[[], int]:
    left = [error] * times

    def call() -> int:
        if left:
            raise left.pop()
        return 7

    return call


def test_tasks_are_done_in_order_and_answered_in_the_loops_thread(etcd_thread: EtcdThread, posted: Any, said: list[Any]) -> None:
    for number in range(3):
        etcd_thread.run(EtcdTask(call=lambda number=number: number, done=said.append))
    for _ in range(3):
        posted.get(timeout=5)()
    assert said == [0, 1, 2]


def test_an_outage_is_waited_for_and_told_once(etcd_thread: EtcdThread, posted: Any, said: list[Any]) -> None:
    etcd_thread.run(EtcdTask(call=failing(3, EtcdUnavailable("etcd is away")), done=said.append))
    for _ in range(5):
        posted.get(timeout=5)()
    assert said == ["etcd is away", 7, "back"]


def test_a_conflict_is_an_answer(etcd_thread: EtcdThread, posted: Any, said: list[Any]) -> None:
    etcd_thread.run(EtcdTask(call=failing(1, Conflict("too late")), done=said.append, refused=lambda error: said.append(str(error))))
    posted.get(timeout=5)()
    assert said == ["too late"]


def test_what_nobody_wants_any_more_is_not_done(etcd_thread: EtcdThread, posted: Any, said: list[Any]) -> None:
    wanted = [False, True]
    etcd_thread.run(EtcdTask(call=failing(9, EtcdUnavailable("away")), done=said.append, wanted=lambda: wanted.pop()))
    etcd_thread.run(EtcdTask(call=lambda: "next", done=said.append))
    for _ in range(3):
        posted.get(timeout=5)()
    assert said == ["away", "back", "next"]


def test_it_stops_in_an_outage(posted: Any) -> None:
    began = threading.Event()

    def call() -> None:
        began.set()
        raise EtcdUnavailable("away")

    etcd_thread = EtcdThread(posted.put, lambda error, seconds, waits: None, lambda: None, lambda error: None)
    etcd_thread.run(EtcdTask(call=call))
    assert began.wait(5)
    etcd_thread.stop()
    assert not etcd_thread._thread.is_alive()


def test_an_outage_is_told_now_and_then_and_not_waited_for_longer_than_its_deadline(posted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    clock = iter(range(0, 10_000, 3))
    told: list[float] = []
    failures: list[ElasticError] = []
    unanswered: list[float] = []
    etcd_thread = EtcdThread(
        posted.put,
        lambda _, seconds, waits: told.append(seconds),
        lambda: None,
        failures.append,
        lambda: float(next(clock)),
        unanswered=lambda _, seconds: unanswered.append(seconds),
    )
    etcd_thread.run(EtcdTask(call=failing(1000, EtcdUnavailable("etcd is away"))))
    while not failures:
        posted.get(timeout=5)()
    etcd_thread.stop()
    assert unanswered == [float(second) for second in range(3, 601, 3)], "counted from when it was first asked"
    assert told == [3.0, 12.0, 30.0, *(float(second) for second in range(60, 601, 60))]
    assert str(failures[0]) == "etcd is away; the job's recovery waited 10 minutes for etcd, so the job ends"


def test_what_waits_for_etcd_is_told(posted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    clock = iter(range(0, 10_000, 400))
    told: list[str] = []
    failures: list[ElasticError] = []
    made = EtcdThread(posted.put, lambda _, seconds, waits: told.append(waits), lambda: None, failures.append, lambda: float(next(clock)))
    made.run(EtcdTask(call=failing(9, EtcdUnavailable("etcd is away")), waits="the takeover"))
    while not failures:
        posted.get(timeout=5)()
    made.stop()
    assert told == ["the takeover"]
    assert str(failures[0]) == "etcd is away; the takeover waited 10 minutes for etcd, so this host gives up"


@pytest.mark.parametrize("error", [EtcdRefused("too large"), NameLost("another has the name"), SettingsError("the name is taken")])
def test_a_refusal_is_not_repeated(etcd_thread: EtcdThread, posted: Any, said: list[Any], error: ElasticError) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        raise error

    etcd_thread.run(EtcdTask(call=call))
    posted.get(timeout=5)()
    etcd_thread.run(EtcdTask(call=lambda: "next", done=said.append))
    posted.get(timeout=5)()
    assert said == [error, "next"]
    assert len(calls) == 1


def test_a_bug_in_a_task_is_told_and_ends_no_thread(etcd_thread: EtcdThread, posted: Any, said: list[Any]) -> None:
    etcd_thread.run(EtcdTask(call=failing(1, KeyError("epoch"))))
    etcd_thread.run(EtcdTask(call=lambda: "next", done=said.append))
    for _ in range(2):
        posted.get(timeout=5)()
    assert isinstance(said[0], JobFailed)
    assert "KeyError: 'epoch'" in str(said[0])
    assert said[1] == "next"


@pytest.mark.parametrize("error", [EtcdUnavailable("away"), EtcdRefused("no")])
def test_what_is_not_needed_is_tried_once(etcd_thread: EtcdThread, posted: Any, said: list[Any], error: Exception) -> None:
    etcd_thread.run(EtcdTask(call=failing(9, error), done=said.append, needed=False))
    etcd_thread.run(EtcdTask(call=lambda: "next", done=said.append))
    posted.get(timeout=5)()
    assert said == ["next"]
