"""Handshakes in progress, bounded in number and time: a connection that does not authenticate is closed, and nothing waits for it."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator

from elastic.comm.greeting import Greeting
from elastic.comm.reactor import Reactor

GREETING_S = 10.0
"""The longest time a handshake may take."""

_MOST, _FEWEST, _SHARE = 256, 8, 8


def room() -> int:
    """Returns how many connections may be unauthenticated at the same time: an eighth of this process's descriptors, 8 to 256."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if limit == resource.RLIM_INFINITY else max(_FEWEST, min(_MOST, limit // _SHARE))


class Admission:
    """The handshakes in progress. Beyond `limit` incoming ones the oldest is closed: a genuine handshake takes milliseconds, and its dialer
    repeats it if it was closed. Call everything on the I/O thread, except `discard` and `add` for dialled connections."""

    def __init__(self, reactor: Reactor, limit: int, patience_s: float = GREETING_S) -> None:
        self.limit, self._patience_s = limit, patience_s
        self._reactor = reactor
        self._lock = threading.Lock()
        self._since: dict[Greeting, float] = {}  # in order of age
        self._strangers: dict[Greeting, None] = {}
        self._sweeping = False

    def __iter__(self) -> Iterator[Greeting]:
        return iter(list(self._since))

    def add(self, greeting: Greeting, *, stranger: bool) -> None:
        """Adds a handshake that begins; `stranger` if the other side dialled."""
        while stranger and len(self._strangers) >= self.limit:
            self.relieve()
        with self._lock:
            self._since[greeting] = time.monotonic()
            if stranger:
                self._strangers[greeting] = None
            idle, self._sweeping = not self._sweeping, True
        if idle:
            self._reactor.call_after(self._patience_s, self._sweep)

    def discard(self, greeting: Greeting) -> None:
        """Removes a handshake that has ended."""
        with self._lock:
            self._since.pop(greeting, None)
            self._strangers.pop(greeting, None)

    def relieve(self) -> None:
        """Closes the oldest incoming connection that has not authenticated, if there is one, and so frees its descriptor."""
        with self._lock:
            unproven = (greeting for greeting in self._strangers if not greeting.proven)
            oldest = next(unproven, next(iter(self._strangers), None))
        if oldest is not None:
            self.discard(oldest)
            oldest.expire()

    def _sweep(self) -> None:
        """Ends handshakes that take too long. One timer serves all, so that a flood of connections makes no flood of timers."""
        now = time.monotonic()
        with self._lock:
            late = [greeting for greeting, since in self._since.items() if since + self._patience_s <= now]
            for greeting in late:
                del self._since[greeting]
                self._strangers.pop(greeting, None)
            again = self._sweeping = bool(self._since)
            left = next(iter(self._since.values()), now) + self._patience_s - now
        for greeting in late:
            greeting.expire()
        if again:
            self._reactor.call_after(left, self._sweep)
