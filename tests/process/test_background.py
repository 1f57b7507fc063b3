"""Tests computations aside from an event loop."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict

import pytest

from elastic.agent.background import Background
from elastic.agent.loop import Loop
from elastic.agent.remote_carrier import observations
from elastic.health.evidence import Observed, Usage
from elastic.observe.activity import Doing, Standing


@pytest.fixture
def loop() -> Loop:
    made = Loop()
    made.set_timer(20.0, lambda: pytest.fail("it never ended"), "never")
    return made


def test_results_come_in_order_in_the_loop_which_goes_on_meanwhile(loop: Loop) -> None:
    background, go, found, beats = Background(loop.post), threading.Event(), list[object](), [0]
    background.run(lambda: (go.wait(10.0), threading.get_ident())[1], found.append)
    background.run(lambda: "second", lambda result: found.append((result, threading.get_ident())))

    def beat() -> None:
        beats[0] += 1
        if beats[0] == 3:
            go.set()
        loop.set_timer(0.001, beat, "beat")

    beat()
    while len(found) < 2:
        loop.turn()
    assert beats[0] >= 3
    assert found[0] != threading.get_ident()
    assert found[1] == ("second", threading.get_ident())


def test_an_exception_is_raised_in_the_loop(loop: Loop) -> None:
    background = Background(loop.post)
    background.run(lambda: 1 // 0, lambda _: pytest.fail("it has no result"))
    with pytest.raises(ZeroDivisionError):
        turn_until_it_fails(loop)


def turn_until_it_fails(loop: Loop) -> None:
    while True:
        loop.turn()


def test_after_its_end_no_result_arrives(loop: Loop) -> None:
    background, go, posted = Background(loop.post), threading.Event(), list[object]()
    background.run(lambda: go.wait(10.0), lambda _: pytest.fail("it was closed"))
    background.close()
    go.set()
    loop.set_timer(0.05, lambda: posted.append(time.monotonic()), "later")
    while not posted:
        loop.turn()


def test_observations_are_json_of_all_their_parts() -> None:
    doing = Doing(worker=1, pid=2, phase="forward", step=3, epoch=4, at=5.0, micro_batch=6)
    standing = Standing(place="step", place_at=1.0, waits_for=-1, waits_at=0.0, longest_s=0.5, first=False)
    usage = Usage(ran_s=1.0, delayed_s=0.1, cpu_s=1.0, io_bytes=3, running=True, wakes=4, wchan="")
    for each in (Observed(worker=1, pid=None), Observed(worker=1, pid=2, doing=doing, standing=standing, usage=usage)):
        assert observations([each]) == [asdict(each)]
