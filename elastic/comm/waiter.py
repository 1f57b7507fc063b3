"""A waiting thread with an event descriptor: it waits for a wake-up and for a socket in one system call, without polling."""

from __future__ import annotations

import os
import select
import threading

from elastic.comm.message import Key


class Waiter:
    """The waiter of one thread. `key` is the message that the thread waits for, or None for a wake-up by every message."""

    __slots__ = ("_event", "_poll", "_thread", "key", "signalled")

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._event, select.POLLIN)
        self._thread = 0
        self.key: Key | None = None
        self.signalled = False

    def assign(self, key: Key | None) -> None:
        self.key = key
        self._thread = threading.get_ident()
        self.signalled = True
        self.clear()

    def wake(self) -> None:
        if not self.signalled:
            self.signalled = True
            if threading.get_ident() != self._thread:
                os.eventfd_write(self._event, 1)

    def clear(self) -> None:
        if self.signalled:
            self.signalled = False
            try:
                os.eventfd_read(self._event)
            except BlockingIOError:
                return

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until it is woken, a watched descriptor is ready, or the time is over."""
        if not self.signalled:
            self._poll.poll(None if timeout_s is None else max(0, timeout_s * 1000))

    def watch(self, descriptor: int) -> None:
        self._poll.register(descriptor, select.POLLIN | select.POLLRDHUP)

    def unwatch(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)

    def close(self) -> None:
        os.close(self._event)
