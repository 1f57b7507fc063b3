"""Tests the measured rates of links: only waiting time and large messages count."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.comm import rate_meter
from elastic.comm.message import MessageKind, Tag
from elastic.comm.network import Network
from elastic.comm.rate_meter import MEASURED_BYTES, LinkRates, RateMeter, news, within_host
from elastic.view import Member


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10.0
        monkeypatch.setattr(rate_meter.time, "perf_counter", lambda: self.now)


def message(found: RateMeter, clock: Clock, ready: int, waited: int, seconds: float) -> None:
    """Records a message of which `ready` bytes had arrived before the wait, and the rest arrived in some seconds."""
    found.got(ready)
    found.waits()
    clock.now += seconds / 2
    found.got(waited // 2)
    found.waits()
    clock.now += seconds / 2
    found.got(waited - waited // 2)
    found.ends()


def test_a_rate_is_of_what_came_while_it_was_waited_for(monkeypatch):
    clock, found = Clock(monkeypatch), RateMeter()
    assert found.bytes_per_s is None
    message(found, clock, 50_000_000, 1_000_000, 0.001)
    assert found.bytes_per_s == pytest.approx(1e9)


def test_small_messages_and_those_that_lay_ready_say_nothing(monkeypatch):
    clock, found = Clock(monkeypatch), RateMeter()
    message(found, clock, 50_000_000, MEASURED_BYTES - 1, 0.001)
    found.got(50_000_000)
    found.ends()
    assert found.bytes_per_s is None


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=200))
def test_a_slow_sender_does_not_make_a_link_slow(seconds):
    with pytest.MonkeyPatch.context() as patch:
        clock, found = Clock(patch), RateMeter()
        for each in seconds:
            message(found, clock, 0, 1_000_000, each)
        rates = sorted(1e6 / each for each in seconds[-64:])
        assert found.bytes_per_s is not None
        assert sum(rate > found.bytes_per_s * 1.000001 for rate in rates) <= len(rates) * 0.1
        assert found.bytes_per_s <= rates[-1] * 1.000001


def test_only_changes_are_news():
    told = {1: LinkRates(1e-4, 1e9), 2: LinkRates(1e-4, None)}
    assert news({1: LinkRates(1.05e-4, 1.05e9), 2: LinkRates(1e-4, None)}, told) == {}
    now = {1: LinkRates(1e-4, 2e9), 2: LinkRates(1e-4, 1e9), 3: LinkRates(None, None), 4: LinkRates(1e-4, None)}
    assert news(now, told) == {1: now[1], 2: now[2], 4: now[4]}


def test_a_host_is_gauged_within_a_moment():
    began = time.perf_counter()
    latency_s, bytes_per_s = within_host()
    assert 0 < latency_s < 0.1
    assert 1e6 < bytes_per_s < 1e12
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("tcp", [False, True])
def test_links_tell_what_they_did(tcp, monkeypatch):
    """Really: each end knows the handshake's latency, and the receiver of large messages their rate.

    The sender pauses between pieces. Without pauses, the scheduler decides whether the receiver ever waits in the middle of a message.
    """
    unpaced = socket.socket.sendmsg

    def paced(sock: socket.socket, views: list[memoryview]) -> int:
        time.sleep(0.001)
        return unpaced(sock, [views[0][: 1 << 20]])

    monkeypatch.setattr(socket.socket, "sendmsg", paced)
    ends = [Network(worker, secret=b"s", host=f"host{worker * tcp}", interface="127.0.0.1" if tcp else None) for worker in (0, 1)]
    try:
        members = [Member(worker=end.worker, host=f"host{end.worker * tcp}", address=end.address) for end in ends]
        joining = threading.Thread(target=ends[0].install, args=(1, 0, members, [1]))
        joining.start()
        ends[1].install(1, 0, members, [0])
        joining.join()
        for step in range(3):
            ends[0].send(1, Tag(MessageKind.BARRIER, step), np.zeros(16 << 20, dtype=np.uint8))
            ends[1].receive(0, Tag(MessageKind.BARRIER, step))
        (seen,), (other,) = (end.seen().values() for end in (ends[1], ends[0]))
        assert seen.latency_s is not None
        assert 0 < seen.latency_s < 5
        assert other.latency_s is not None
        assert seen.bytes_per_s is not None
        assert seen.bytes_per_s > 1e6
        assert other.bytes_per_s is None
    finally:
        for end in ends:
            end.close()
