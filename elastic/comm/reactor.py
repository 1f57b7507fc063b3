"""The I/O thread of a worker's links: epoll, a handler per descriptor, and a few delayed calls."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections.abc import Callable

READABLE = select.EPOLLIN | select.EPOLLRDHUP
WRITABLE = select.EPOLLOUT


class Reactor:
    """Calls the handler of a ready descriptor with its events, and delayed calls, on its own thread.

    If a handler raises, which is a defect, `crashed` is called with the exception and the thread ends.
    """

    def __init__(self, name: str, *, crashed: Callable[[BaseException], None]) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._stopping = False
        self._crashed = crashed
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.add(self._wake, select.EPOLLIN, self._on_wake)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, descriptor: int, events: int, handler: Callable[[int], None]) -> None:
        """Registers `handler` for the events of a descriptor. Any thread may call it.

        Raises OSError if the kernel has no room for it.
        """
        self._handlers[descriptor] = handler
        try:
            self._epoll.register(descriptor, events)
        except OSError:
            del self._handlers[descriptor]
            raise

    def modify(self, descriptor: int, events: int) -> None:
        """Changes the events of a descriptor. Any thread may call this and the next two."""
        if not self._epoll.closed:
            self._epoll.modify(descriptor, events)

    def remove(self, descriptor: int) -> None:
        """The inverse of `add`; call it before the descriptor is closed."""
        self._handlers.pop(descriptor, None)
        if not self._epoll.closed:
            self._epoll.unregister(descriptor)

    def call_after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Calls `action` on the I/O thread after a delay."""
        with self._lock:
            heapq.heappush(self._calls, (time.monotonic() + delay_s, next(self._order), action))
            if not self._stopping:
                os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Ends the thread; returns when it has ended, or at once when called on that thread."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _on_wake(self, _events: int) -> None:
        os.eventfd_read(self._wake)

    def _run(self) -> None:
        try:
            while not self._stopping:
                for descriptor, events in self._epoll.poll(self._delay()):
                    handler = self._handlers.get(descriptor)
                    if handler is not None and not self._stopping:
                        handler(events)
                self._call_due()
        except BaseException as error:
            self._crashed(error)
            raise
        finally:
            with self._lock:
                self._stopping = True
                os.close(self._wake)
            self._epoll.close()

    def _delay(self) -> float | None:
        with self._lock:
            return max(0.0, self._calls[0][0] - time.monotonic()) if self._calls else None

    def _call_due(self) -> None:
        while True:
            with self._lock:
                if not self._calls or self._calls[0][0] > time.monotonic():
                    return
                _, _, action = heapq.heappop(self._calls)
            action()
