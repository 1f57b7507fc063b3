"""Tests which agent goes on with a job without a coordinator, and when one goes on although etcd has lost the job's data."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from elastic.agent.agent_link import AgentListener, secret_of
from elastic.agent.loop import Loop
from elastic.agent.succession import Succession, succession
from elastic.agent.witnesses import LifeSigns, doubtful
from tests.etcd_access import Standing

JOB = b"the secret of a job"
MARK = '{"epoch": 3, "attempt": 1, "digest": "d"}'


@pytest.mark.parametrize(
    ("standing", "knows", "took_part", "searched_s", "expected"),
    [
        ({"mark": MARK}, True, True, 0.0, Succession.LEAD),
        ({"mark": MARK, "settled": False}, True, True, 0.0, Succession.WAIT),
        ({"mark": MARK, "outcome": {"type": "done"}}, True, True, 0.0, Succession.ENDED),
        ({"named": False}, True, True, 0.0, Succession.ENDED),
        ({"named": False, "forgotten": True}, True, True, 0.0, Succession.LEAD),
        ({"named": False, "forgotten": True, "settled": False}, True, True, 99.0, Succession.WAIT),
        ({"named": False, "forgotten": True, "outcome": {"type": "done"}}, True, True, 0.0, Succession.ENDED),
        ({"forgotten": True}, True, True, 0.0, Succession.LEAD),
        ({}, False, False, 0.0, Succession.LEAD),
        ({"named": False}, False, False, 0.0, Succession.REJOIN),
        ({"named": False, "forgotten": True}, False, True, 19.0, Succession.WAIT),
        ({"named": False}, False, True, 19.0, Succession.WAIT),
        ({"named": False}, False, True, 21.0, Succession.ENDED),
        ({}, False, True, 19.0, Succession.WAIT),
        ({}, False, True, 21.0, Succession.ENDED),
        ({"mark": MARK}, False, False, 59.0, Succession.WAIT),
        ({"mark": MARK}, False, True, 61.0, Succession.LOST),
    ],
)
def test_who_leads(standing: dict[str, Any], knows: bool, took_part: bool, searched_s: float, expected: Succession) -> None:
    found = succession(Standing(leader=None, **standing), knows=knows, took_part=took_part, searched_s=searched_s)
    assert found is expected


@pytest.mark.parametrize(
    ("members", "present", "gone", "expected"),
    [
        ("ab", "b", "", "a"),  # half of two is no majority
        ("ab", "b", "a", ""),
        ("ab", "ab", "", ""),
        ("abc", "bc", "", ""),
        ("abc", "c", "a", "b"),
        ("abc", "c", "ab", ""),
        ("abcd", "cd", "", "ab"),
        ("abcd", "cd", "a", ""),
        ("ab", "bx", "", "a"),  # others than the members do not count
    ],
)
def test_a_view_is_resumed_if_nobody_else_can_train_in_a_newer_one(members: str, present: str, gone: str, expected: str) -> None:
    assert doubtful(members, present, gone) == set(expected)


def until_asked(loop: Loop, signs: LifeSigns) -> None:
    for _ in range(500):
        if not signs._dialled:
            return
        loop.set_timer(0.01, lambda: None, "test")
        loop.turn()
    raise AssertionError


def test_an_agent_has_ended_where_nobody_listens_or_somebody_else() -> None:
    loop = Loop()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    alive = AgentListener(loop, secret_of(JOB, "alive"), "127.0.0.1")
    other = AgentListener(loop, secret_of(JOB, "a later agent of that machine"), "127.0.0.1")
    at = {"ended": ("127.0.0.1", port), "alive": alive.address, "replaced": other.address}
    signs = LifeSigns(loop, JOB, at, None)
    signs.ask({*at, "of unknown address"})
    until_asked(loop, signs)
    assert signs.gone == {"ended", "replaced"}
    signs.ask(at)
    until_asked(loop, signs)
    assert signs.gone == {"ended", "replaced"}
    for listener in (alive, other):
        listener.close()


def test_a_stopped_agent_has_not_ended() -> None:
    loop = Loop()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # its kernel accepts, and nobody answers
        signs = LifeSigns(loop, JOB, {"stopped": silent.getsockname()}, None)
        signs.ask({"stopped"})
        for _ in range(20):
            loop.set_timer(0.01, lambda: None, "test")
            loop.turn()
        assert signs.gone == set()
        signs.close()
