"""How fast messages pass: over links, while they are used; and within a host, before there is a link.

A link's rate is taken from large messages that arrive while their receiver waits for them: from the moment at which it found nothing to
read until the last byte. What lay ready does not count, since the kernel hands that over as fast as it copies. A sender that is slow makes
a rate too low, so an upper quantile of the last ones is what the link can do, at least. Its latency is half a round trip of its handshake.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from elastic.memory.raw import room

MEASURED_BYTES = 128 << 10
"""The least that must have arrived behind the wait."""

_KEPT = 64
_QUANTILE = 0.9
_CHANGE = 1.1
_PINGS = 40
_BURSTS, _BURST_BYTES = 4, 2 << 20


class LinkRates(NamedTuple):
    """What is known of one link; None where nothing was observed."""

    latency_s: float | None
    bytes_per_s: float | None


class RateMeter:
    """The last rates of one direction of a link. For one thread at a time, but `bytes_per_s` for any."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_KEPT)
        self._since: float | None = None
        self._bytes = 0

    def waits(self) -> None:
        """Nothing more of the message is there."""
        if self._since is None:
            self._since, self._bytes = time.perf_counter(), 0

    def got(self, count: int) -> None:
        """So many bytes of it have come."""
        self._bytes += count

    def ends(self) -> None:
        """The message is whole."""
        if self._since is not None and self._bytes >= MEASURED_BYTES:
            self._rates.append(self._bytes / max(time.perf_counter() - self._since, 1e-9))
        self._since = None

    @property
    def bytes_per_s(self) -> float | None:
        """What the link can do; None before a large message was waited for."""
        rates = sorted(self._rates.copy())
        return rates[min(len(rates) - 1, int(_QUANTILE * len(rates)))] if rates else None


def news(seen: Mapping[int, LinkRates], told: Mapping[int, LinkRates]) -> dict[int, LinkRates]:
    """What has changed so much by peer, beside what was told before, that it is worth telling."""
    return {peer: now for peer, now in seen.items() if _changed(now, told.get(peer, LinkRates(None, None)))}


def _changed(now: LinkRates, before: LinkRates) -> bool:
    pairs = [(a, b) for a, b in zip(now, before, strict=True) if a is not None]
    return any(b is None or max(a, b) > _CHANGE * min(a, b) for a, b in pairs)


def within_host() -> tuple[float, float]:
    """Seconds of latency and bytes a second between two threads of this process over a pair of UNIX sockets, in a few milliseconds.

    Sockets between processes are the same ones; who waits for them is woken alike.
    """
    here, there = socket.socketpair()
    with here, there:
        answering = threading.Thread(target=_answer, args=(there,), name="elastic-rates", daemon=True)
        answering.start()
        trips = [_round_trip(here) for _ in range(_PINGS)]
        rate = max(_burst(here) for _ in range(_BURSTS))
        here.shutdown(socket.SHUT_WR)
        answering.join()
    return statistics.median(trips) / 2, rate


def _answer(sock: socket.socket) -> None:
    """Sends a byte back for each ping, and one behind each burst."""
    buffer = room(_BURST_BYTES)
    for _ in range(_PINGS):
        sock.recv_into(buffer[:1])
        sock.sendall(buffer[:1])
    for _ in range(_BURSTS):
        left = _BURST_BYTES
        while left:
            left -= sock.recv_into(buffer[:left])
        sock.sendall(buffer[:1])


def _round_trip(sock: socket.socket) -> float:
    began = time.perf_counter()
    sock.sendall(b"\0")
    sock.recv(1)
    return time.perf_counter() - began


def _burst(sock: socket.socket) -> float:
    memory = bytes(_BURST_BYTES)
    began = time.perf_counter()
    sock.sendall(memory)
    sock.recv(1)
    return _BURST_BYTES / (time.perf_counter() - began)
