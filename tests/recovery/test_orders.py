"""Tests the agent's orders to a worker: which are accepted, which are ignored, and what they interrupt."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.comm import LoopbackHub, LoopbackNetwork, MessageKind, Tag
from elastic.errors import Interrupted
from elastic.settings import JobSettings
from elastic.worker.job import Job, WorkerSpec
from tests.recovery.recovering import view_of


class Waits:
    """Records messages; `interrupted` is what a wait would find now."""

    def __init__(self) -> None:
        self.interrupted = False

    def interrupt(self, error: BaseException) -> None:
        assert isinstance(error, Interrupted)
        self.interrupted = True

    def resume(self) -> None:
        self.interrupted = False


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def job(tmp_path: Path, waits: Waits) -> Job:
    settings = JobSettings(name="job", workers=3, train_fn="m:f", isa="avx2")
    made = Job(WorkerSpec(worker=1, host="here", directory=str(tmp_path), secret="5e", settings=settings), lambda message: None)
    made.listen_on(waits)
    return made


def quiesce(attempt: int, epoch: int = 2) -> dict[str, Any]:
    return {"type": "quiesce", "epoch": epoch, "attempt": attempt, "lost": [], "restore": False}


PROPOSE: dict[str, Any] = {"type": "propose", "proposal": {}}
VIEW: dict[str, Any] = {"type": "view", "view": {}}


def taken(job: Job, *orders: dict[str, Any]) -> list[dict[str, Any]]:
    for order in orders:
        job.deliver(order)
    found = []
    while job._orders:
        found.append(job.take_order())
    return found


def test_orders_are_taken_as_they_came(job: Job) -> None:
    assert taken(job, quiesce(1), PROPOSE, VIEW) == [quiesce(1), PROPOSE, VIEW]


@pytest.mark.parametrize(
    ("orders", "left"),
    [
        ([quiesce(1), quiesce(2)], [quiesce(2)]),
        ([quiesce(1), PROPOSE, quiesce(2)], [quiesce(2)]),
        ([PROPOSE, quiesce(2), PROPOSE], [quiesce(2), PROPOSE]),
        ([quiesce(1), PROPOSE, quiesce(2), PROPOSE, quiesce(3)], [quiesce(3)]),
        ([VIEW, quiesce(1, epoch=3)], [VIEW, quiesce(1, epoch=3)]),
        ([quiesce(1), PROPOSE, VIEW, quiesce(1, epoch=3), quiesce(2, epoch=3)], [VIEW, quiesce(2, epoch=3)]),
    ],
)
def test_what_a_later_quiesce_has_overtaken_is_left_out_but_for_views(job: Job, orders: list[Any], left: list[Any]) -> None:
    """Every worker that gets a committed view is a member of it, even if the view does not last."""
    assert taken(job, *orders) == left


def test_a_segment_is_kept_once_whatever_becomes_of_the_order_that_it_came_with(job: Job) -> None:
    pipes = [os.pipe() for _ in range(2)]
    for number, (_, write) in enumerate(pipes):
        job.deliver(quiesce(2 * number))
        job.deliver({**PROPOSE, "mapped": [0], "fds": [write]})
    assert [order["type"] for order in taken(job)] == ["quiesce", "propose"]
    (kept, open_still), (again, _) = pipes
    assert os.read(again, 1) == b""  # nobody has its other end
    os.write(open_still, b"x")
    assert os.read(kept, 1) == b"x"
    job.segments[0].close()
    for fd in (kept, again):
        os.close(fd)


def test_an_order_is_waited_for(job: Job) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(job.take_order()))
    thread.start()
    job.deliver({"type": "boundary"})
    assert found == []
    job.deliver(PROPOSE)
    thread.join(10)
    assert found == [PROPOSE]


def test_only_quiesce_interrupts_until_it_is_taken(job: Job, waits: Waits) -> None:
    job.deliver(PROPOSE)
    job.deliver(VIEW)
    assert not waits.interrupted
    job.deliver(quiesce(1))
    assert waits.interrupted
    job.take_order()
    job.take_order()
    assert not waits.interrupted
    job.deliver(quiesce(2))
    assert waits.interrupted, "a later attempt interrupts again"


def test_a_view_that_is_taken_does_not_end_the_interruption_by_a_quiesce_behind_it(job: Job, waits: Waits) -> None:
    job.deliver(VIEW)
    job.deliver(quiesce(1, epoch=3))
    assert job.take_order() == VIEW
    assert waits.interrupted, "it would wait for peers who have quiesced already, and the agent for its inventory"
    assert job.take_order() == quiesce(1, epoch=3)
    assert not waits.interrupted


def test_the_other_messages_are_no_orders(job: Job, waits: Waits) -> None:
    for kind in ("boundary", "stop", "leave", "of another version"):
        job.deliver({"type": kind})
    assert job._orders == []
    assert (job.pause_requested, job.stop_requested, job.dismissed.is_set(), waits.interrupted) == (True, True, True, False)


def test_a_new_view_ends_the_request_to_pause(job: Job) -> None:
    job.deliver({"type": "boundary"})
    view = view_of([0, 1, 2])
    job.switch(view)
    assert (job.view, job.epoch, job.pause_requested, job.leader) == (view, view.epoch, False, False)


def test_announcing_ends_with_the_first_view_or_with_a_running_jobs_first_order(job: Job) -> None:
    sent: list[Any] = []
    job.send = sent.append
    view = view_of([0, 1, 2])
    job.deliver({"type": "view", "view": view.to_json()})
    assert job.announce({"address": "unix:@1"}) == view
    assert sent == [{"type": "announce", "ready": {"address": "unix:@1"}}]
    job.deliver(quiesce(1))
    assert job.announce({}) is None
    assert job.take_order() == quiesce(1), "which is left for whoever joins"


@pytest.fixture
def network() -> Iterator[LoopbackNetwork]:
    found = LoopbackNetwork(1, LoopbackHub())
    found.install(1, 0, [], [])
    yield found
    found.close()


@pytest.mark.parametrize("wait", [lambda network: network.receive(0, Tag(MessageKind.GRADIENT, 1)), lambda network: network.flush()])
def test_an_order_to_quiesce_ends_a_real_wait(job: Job, network: LoopbackNetwork, wait: Callable[[LoopbackNetwork], Any]) -> None:
    job.listen_on(network)
    job.deliver(quiesce(1))
    with pytest.raises(Interrupted, match="the members of the job change"):
        wait(network)
    job.take_order()
    network.flush()
