from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic.errors import Conflict, EtcdUnavailable
from elastic.membership import clerk as module
from elastic.membership.clerk import Clerk, Errand


@pytest.fixture
def posted() -> queue.SimpleQueue[Callable[[], None]]:
    return queue.SimpleQueue()


@pytest.fixture
def said() -> list[Any]:
    return []


@pytest.fixture
def clerk(posted: queue.SimpleQueue[Callable[[], None]], said: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Clerk]:
    monkeypatch.setattr(module, "RETRY_S", 0.0)
    made = Clerk(posted.put, lambda error: said.append(str(error)), lambda: said.append("back"))
    yield made
    made.stop()


def failing(times: int, error: Exception) -> Callable[[], int]:
    left = [error] * times

    def call() -> int:
        if left:
            raise left.pop()
        return 7

    return call


def test_errands_are_done_in_order_and_answered_in_the_loops_thread(clerk: Clerk, posted: Any, said: list[Any]) -> None:
    for number in range(3):
        clerk.run(Errand(call=lambda number=number: number, done=said.append))
    for _ in range(3):
        posted.get(timeout=5)()
    assert said == [0, 1, 2]


def test_an_outage_is_waited_for_and_told_once(clerk: Clerk, posted: Any, said: list[Any]) -> None:
    clerk.run(Errand(call=failing(3, EtcdUnavailable("etcd is away")), done=said.append))
    for _ in range(3):
        posted.get(timeout=5)()
    assert said == ["etcd is away", 7, "back"]


def test_a_conflict_is_an_answer(clerk: Clerk, posted: Any, said: list[Any]) -> None:
    clerk.run(Errand(call=failing(1, Conflict("too late")), done=said.append, refused=lambda error: said.append(str(error))))
    posted.get(timeout=5)()
    assert said == ["too late"]


def test_what_nobody_wants_any_more_is_not_done(clerk: Clerk, posted: Any, said: list[Any]) -> None:
    wanted = [False, True]
    clerk.run(Errand(call=failing(9, EtcdUnavailable("away")), done=said.append, wanted=lambda: wanted.pop()))
    clerk.run(Errand(call=lambda: "next", done=said.append))
    for _ in range(3):
        posted.get(timeout=5)()
    assert said == ["away", "back", "next"]


def test_it_stops_in_an_outage(posted: Any) -> None:
    began = threading.Event()

    def call() -> None:
        began.set()
        raise EtcdUnavailable("away")

    clerk = Clerk(posted.put, lambda error: None, lambda: None)
    clerk.run(Errand(call=call))
    assert began.wait(5)
    clerk.stop()
    assert not clerk._thread.is_alive()
