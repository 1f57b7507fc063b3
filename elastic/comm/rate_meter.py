"""Measures latency and rate: of links while they are used, and within a host before there is a link.

A link's rate is measured on large messages that arrive while their receiver waits for them, from the moment at which it found nothing to
read until the last byte. Bytes that had arrived before do not count, since the kernel returns them as fast as it copies. A slow sender
makes a rate too low, so an upper quantile of the last rates is a lower bound of the link's. Its latency is half a handshake round trip.
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
"""The least bytes that must arrive after the wait began for a rate to count."""

_KEPT = 64
_QUANTILE = 0.9
_CHANGE = 1.1
_PINGS = 40
_BURSTS, _BURST_BYTES = 4, 2 << 20


class LinkRates(NamedTuple):
    """The observed latency and rate of one link; None where nothing was observed."""

    latency_s: float | None
    bytes_per_s: float | None


class RateMeter:
    """The last rates of one direction of a link. One thread at a time may use it; any thread may read `bytes_per_s`."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=_KEPT)
        self._since: float | None = None
        self._bytes = 0

    def waits(self) -> None:
        """Starts the measurement, if it has not started: the receiver found nothing more to read."""
        if self._since is None:
            self._since, self._bytes = time.perf_counter(), 0

    def got(self, count: int) -> None:
        """Counts received bytes of the message."""
        self._bytes += count

    def ends(self) -> None:
        """Ends the measurement, since the message is whole."""
        if self._since is not None and self._bytes >= MEASURED_BYTES:
            self._rates.append(self._bytes / max(time.perf_counter() - self._since, 1e-9))
        self._since = None

    @property
    def bytes_per_s(self) -> float | None:
        """The link's rate, at least; None before a receiver waited for a large message."""
        rates = sorted(self._rates.copy())
        return rates[min(len(rates) - 1, int(_QUANTILE * len(rates)))] if rates else None


def news(seen: Mapping[int, LinkRates], reported: Mapping[int, LinkRates]) -> dict[int, LinkRates]:
    """Returns the rates, by peer, that differ enough from those reported before (`reported`) to be reported again."""
    return {peer: now for peer, now in seen.items() if _changed(now, reported.get(peer, LinkRates(None, None)))}


def _changed(now: LinkRates, before: LinkRates) -> bool:
    pairs = [(a, b) for a, b in zip(now, before, strict=True) if a is not None]
    return any(b is None or max(a, b) > _CHANGE * min(a, b) for a, b in pairs)


def within_host() -> tuple[float, float]:
    """Measures latency (seconds) and bytes a second between two threads over a pair of UNIX sockets, in a few milliseconds.

    Sockets between processes are of the same kind, and their waiters are woken in the same way.
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
    """Sends a byte back for each ping, and one after each burst."""
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
