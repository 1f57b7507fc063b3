"""Tests the listener of agents against strangers, and hosts that connect again before their old link is lost."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from elastic.agent import agent_link
from elastic.agent.agent_link import AgentListener, dial
from elastic.agent.hosts import Hosts
from elastic.agent.loop import Loop
from elastic.agent.remote_carrier import RemoteCarrier
from elastic.host.facts import HostFacts

SECRET = b"a secret of agents"


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def listener(loop: Loop) -> Iterator[AgentListener]:
    made = AgentListener(loop, SECRET, "127.0.0.1")
    yield made
    made.close()


def until(loop: Loop, met: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        loop.set_timer(0.01, lambda: None, "test")
        loop.turn()


def test_strangers_who_hold_many_connections_keep_no_agent_out(loop: Loop, listener: AgentListener) -> None:
    came: list[socket.socket] = []
    reached: list[socket.socket] = []
    listener.connected = came.append
    with ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(listener.address)) for _ in range(agent_link._WAITING)]
        until(loop, lambda: len(listener._greeting) == agent_link._WAITING)
        strangers += [stack.enter_context(socket.create_connection(listener.address)) for _ in range(9)]
        strangers[-1].sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
        dial(loop, SECRET, listener.address, reached.append, lambda error: pytest.fail(str(error)))
        until(loop, lambda: came and reached)
        assert len(listener._greeting) <= agent_link._WAITING
    for sock in (*came, *reached):
        sock.close()


def test_a_connection_that_is_closed_for_another_one_in_the_same_turn_does_no_harm(
    loop: Loop, listener: AgentListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_link, "_WAITING", 1)
    with socket.create_connection(listener.address) as first:
        until(loop, lambda: listener._greeting)
        (greeting,) = listener._greeting.values()
        first.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with socket.create_connection(listener.address):
            listener._accept()
            greeting.on_event(0)  # it was found readable before it was closed
            until(loop, lambda: len(listener._greeting) == 1)
            assert greeting not in listener._greeting.values()


def test_a_host_that_comes_back_before_it_was_found_lost_stays() -> None:
    local = RemoteCarrier(None, "here", 1, 0, HostFacts(processors=1))
    before, after = (RemoteCarrier(None, "there", 2, 0, HostFacts(processors=1)) for _ in range(2))
    hosts = Hosts(local)
    hosts.add(before)
    hosts.fork(0, "there")
    hosts.add(after)
    hosts.fork(1, "there")
    hosts.remove(before)
    assert hosts.present == {"here": local, "there": after}
    assert hosts.room == 3
    assert [seen.worker for seen in hosts.look([0, 1])] == [1], "the workers of its earlier agent are gone"
